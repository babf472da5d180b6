import json

import pytest

from lightning_align.data.whole_folder import (
    MANIFEST,
    FileWriter,
    problem_of,
    write_whole,
    write_whole_file,
)
from tests.helpers.faulty_files import flip


def two_files(folder, content=b"abc"):
    files = {}
    for name in ("one", "two"):
        writer = FileWriter(folder / name)
        writer.write(content)
        files[name] = writer.close()
    return {"files": files, "more": 1}


def test_a_writer_says_what_it_wrote(tmp_path):
    writer = FileWriter(tmp_path / "file")
    writer.write(b"ab")
    writer.write(b"c")
    assert writer.close()["size"] == 3


def test_a_folder_is_whole_and_says_what_it_is(tmp_path):
    write_whole(tmp_path / "a.b", "key", two_files)
    assert problem_of(tmp_path / "a.b", "key") is None
    assert json.loads((tmp_path / "a.b" / MANIFEST).read_text())["more"] == 1
    assert "manifest of another" in problem_of(tmp_path / "a.b", "other")
    assert "is missing" in problem_of(tmp_path / "b", "key")
    assert [path.name for path in tmp_path.iterdir()] == ["a.b"]


def test_what_was_changed_is_seen(tmp_path):
    write_whole(tmp_path / "a", "key", two_files)
    flip(tmp_path / "a" / "two", 1)
    assert problem_of(tmp_path / "a", "key", read_all=False) is None, "sizes alone"
    assert problem_of(tmp_path / "a", "key") == "the content of two has changed"
    (tmp_path / "a" / "two").write_bytes(b"ab")
    assert "two has 2 bytes" in problem_of(tmp_path / "a", "key", read_all=False)


def test_a_folder_that_cannot_be_written_leaves_the_old_one(tmp_path):
    """Also where a killed process has left its part."""
    write_whole(tmp_path / "a", "key", two_files)
    (tmp_path / "a.tmp").mkdir()

    def fail(folder):
        two_files(folder)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_whole(tmp_path / "a", "key", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert problem_of(tmp_path / "a", "key") is None
    write_whole(tmp_path / "a", "new", lambda folder: two_files(folder, b"longer"))
    assert problem_of(tmp_path / "a", "new") is None


def test_a_file_is_replaced_in_one_move(tmp_path, monkeypatch):
    write_whole_file(tmp_path / "file", b"old", "me")
    write_whole_file(tmp_path / "file", b"new", "me")
    assert (tmp_path / "file").read_bytes() == b"new"

    def full(self):
        raise OSError("no room")

    monkeypatch.setattr(FileWriter, "close", full)
    with pytest.raises(OSError, match="no room"):
        write_whole_file(tmp_path / "file", b"newer", "me")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"new"
