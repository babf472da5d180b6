"""One checkpoint takes the place of another by renames; each point of a kill is gone on from."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_align.strategies import replacing


def write(path: Path, text: str, *, as_file: bool = False) -> None:
    """A folder with one file in it, or that file alone."""
    if as_file:
        path.write_text(text)
    else:
        path.mkdir()
        (path / "data").write_text(text)


def read(path: Path) -> str:
    place = replacing.whereabouts(path)
    return (place / "data" if place.is_dir() else place).read_text()


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_a_new_one_takes_the_place_of_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "last.ckpt"
    for text in ("old", "new"):
        folder = replacing.begin(path)
        assert folder == replacing.unfinished(path)
        assert list(folder.iterdir()) == []
        (folder / "data").write_text(text)
        replacing.end(path)
        assert read(path) == text
    assert names(path.parent) == {"last.ckpt"}
    replacing.remove(path)
    assert names(path.parent) == set()


@pytest.mark.parametrize("old_is_file", [True, False])
@pytest.mark.parametrize("new_is_file", [True, False])
def test_a_file_and_a_folder_replace_each_other(
    old_is_file: bool, new_is_file: bool, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    write(path, "old", as_file=old_is_file)
    write(replacing.unfinished(path), "new", as_file=new_is_file)
    replacing.end(path)
    assert (read(path), names(tmp_path)) == ("new", {"last.ckpt"})


LEFT: dict[str, tuple[tuple[str, ...], str]] = {
    "half a new one": (("a", ".a.unfinished"), "a"),
    "a whole new one": (("a", ".a.new"), ".a.new"),
    "both renamed away": ((".a.new", ".a.old"), ".a.new"),
    "the old one not yet discarded": (("a", ".a.old"), "a"),
    "nothing but the old one": ((".a.old",), ".a.old"),
    "nothing but the old one, and half a new one": ((".a.old", ".a.unfinished"), ".a.old"),
    "all of them": (("a", ".a.new", ".a.old", ".a.unfinished"), ".a.new"),
}
AFTERWARDS: list[Callable[[Path], object]] = [replacing.finish, replacing.begin]


@pytest.mark.parametrize("go_on", AFTERWARDS)
@pytest.mark.parametrize("case", LEFT)
def test_what_a_kill_has_left_is_read_and_then_finished(
    case: str, go_on: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "a"
    left, newest = LEFT[case]
    for name in left:
        write(tmp_path / name, name)
    assert read(path) == newest
    go_on(path)
    assert (path / "data").read_text() == newest
    assert names(tmp_path) - {replacing.unfinished(path).name} == {"a"}
    shutil.rmtree(replacing.unfinished(path), ignore_errors=True)


def test_a_place_where_nothing_ever_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert replacing.whereabouts(path) == path
    replacing.finish(path)
    replacing.remove(path)
    assert names(tmp_path) == set()
    assert replacing.whereabouts(Path("/")) == Path("/")


def test_places_that_a_killed_run_has_yet_to_fill(tmp_path: Path) -> None:
    for name in ("b.ckpt", ".b.ckpt.new", ".c.ckpt.new", ".a.ckpt.new", ".d.ckpt.old", ".e.new"):
        write(tmp_path / name, name)
    assert replacing.empty_places(tmp_path) == [tmp_path / "a.ckpt", tmp_path / "c.ckpt"]


def test_a_link_is_deleted_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "kept")
    path = tmp_path / "a"
    path.symlink_to(tmp_path / "elsewhere")
    write(replacing.begin(path) / "part", "new")
    replacing.end(path)
    assert not path.is_symlink()
    assert (tmp_path / "elsewhere" / "data").read_text() == "kept"
