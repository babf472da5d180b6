"""A folder of files on a local disk and behind URLs."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_align.checkpointing.files import Folder
from tests.helpers.faulty_files import FaultyFileSystem, faulty


@pytest.fixture(params=["local", "file", "memory", "faulty"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    urls = {
        "local": str(tmp_path / "run"),
        "file": f"file://{tmp_path}/run/",
        "memory": "memory://files_test/run/",
        "faulty": "faulty://files_test/run",
    }
    with faulty():
        yield Folder(urls[request.param])
    memory = fsspec.filesystem("memory")
    if memory.exists("/files_test"):
        memory.rm("/files_test", recursive=True)


def test_a_folder_that_is_not_there_is_empty(folder: Folder) -> None:
    assert folder.names() == []
    assert folder.size("a") is None
    folder.delete("a")
    with pytest.raises(FileNotFoundError):
        folder.read("a")


def test_what_is_written_is_read_listed_and_deleted(folder: Folder) -> None:
    folder.create()
    folder.create()  # it may be there
    folder.write("b", [b"one", memoryview(b"two"), b""])
    folder.write("a", iter([b"x"]))
    assert folder.names() == ["a", "b"]
    assert (folder.read("b"), folder.size("b")) == (b"onetwo", 6)
    folder.write("b", [b"new"])  # shorter than before
    assert (folder.read("b"), folder.size("b")) == (b"new", 3)
    with folder.open("b") as file:
        file.seek(1)
        assert file.read() == b"ew"
    folder.sync()
    folder.delete("b")
    folder.delete("b")
    assert folder.names() == ["a"]
    assert folder.size("b") is None


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chunks=st.lists(st.binary(max_size=40), max_size=5))
def test_chunks_come_out_one_after_the_other(folder: Folder, chunks: list[bytes]) -> None:
    folder.create()
    folder.write("file", chunks)
    assert folder.read("file") == b"".join(chunks)
    assert folder.size("file") == sum(map(len, chunks))


def test_another_process_is_seen(folder: Folder) -> None:
    """Some filesystems keep what they listed."""
    folder.create()
    assert folder.names() == []
    assert folder.size("late") is None
    Folder(str(folder)).write("late", [b"12"])
    assert folder.names() == ["late"]
    assert folder.size("late") == 2


def test_paths_lead_back(folder: Folder) -> None:
    assert folder.path("a.ckpt") == f"{folder}/a.ckpt"
    assert str(Folder(str(folder))) == str(folder)
    assert not str(folder).endswith("/")


def test_a_relative_folder_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Folder("run")
    monkeypatch.chdir("/")
    assert str(folder) == str(tmp_path / "run")
    assert folder.is_local


def test_options_reach_the_filesystem() -> None:
    with faulty():
        folder = Folder("faulty://files_test", {"token": "x"})
        assert FaultyFileSystem.options == folder.options == {"token": "x"}
        assert not folder.is_local


def test_a_write_that_stops_half_way_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """write(2) may take less than it is given: more than 2 GiB at once, for one."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    Folder(tmp_path).write("a", [b"0123456789", memoryview(b"abc")])
    assert (tmp_path / "a").read_bytes() == b"0123456789abc"


def test_a_local_file_and_its_entry_are_synced_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    kinds: list[bool] = []

    def note(descriptor: int) -> None:
        synced.append(descriptor)
        kinds.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))

    monkeypatch.setattr(os, "fsync", note)
    folder = Folder(tmp_path)
    folder.write("a", [b"x"])
    folder.sync()
    assert kinds == [False, True]
    for descriptor in synced:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_failures_of_the_filesystem_come_through() -> None:
    def before(operation: str, name: str) -> None:
        if name == "bad":
            raise PermissionError(operation)

    with faulty(before):
        folder = Folder("faulty://files_test")
        folder.create()
        folder.write("good", [b"x"])
        with pytest.raises(PermissionError, match="write"):
            folder.write("bad", [b"x"])
        with pytest.raises(PermissionError, match="read"):
            folder.read("bad")
        with pytest.raises(PermissionError, match="delete"):
            folder.delete("bad")
        assert folder.names() == ["good"]


@pytest.mark.parametrize(
    ("dirpath", "message"),
    [
        ("", r"checkpointing\(dirpath=''\): must be a path or a URL"),
        (b"run", r"checkpointing\(dirpath=b'run'\): must be a path or a URL"),
        ("s4://x", r"checkpointing\(dirpath='s4://x'\): Protocol not known: s4"),
    ],
)
def test_what_is_no_folder_is_refused(dirpath: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Folder(dirpath)
