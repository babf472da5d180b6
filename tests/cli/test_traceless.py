"""What a run that leaves nothing does with folders: its own, and those that its set-up makes."""

import os
from pathlib import Path

import pytest

from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.lock import LOCK_FILE, FolderLock
from lightning_align.cli.traceless import FOLDER, folders_as_they_were, scratch_folder


def test_the_folder_is_gone_afterwards_and_shared_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with scratch_folder("check") as folder:
        assert Path(folder).parent == tmp_path
        with scratch_folder("check") as of_a_rank:  # a process that a strategy has started
            assert of_a_rank == folder
        assert Path(folder).is_dir()
    assert not list(tmp_path.iterdir())
    assert FOLDER.format("CHECK") not in os.environ
    with pytest.raises(RuntimeError), scratch_folder("check") as folder:
        raise RuntimeError
    assert not Path(folder).exists()


def test_folders_of_a_set_up_go_and_those_with_something_in_them_stay(tmp_path: Path) -> None:
    locked, used, there = tmp_path / "a/locked", tmp_path / "b/used", tmp_path / "there"
    (there / "version_0").mkdir(parents=True)
    with folders_as_they_were([str(locked), used, there, "s3://bucket/elsewhere"]):
        locked.mkdir(parents=True)
        (locked / LOCK_FILE).touch()
        used.mkdir(parents=True)
        (used / "step=1.ckpt").touch()
        (there / LOCK_FILE).touch()
        (there / "version_1").mkdir()
        (there / "version_1" / LOCK_FILE).touch()
    assert {path.name for path in tmp_path.rglob("*")} == {
        *("b", "used", "step=1.ckpt"),
        *("there", LOCK_FILE, "version_0"),
    }


def test_the_folder_of_a_run_that_has_begun_meanwhile_stays(tmp_path: Path) -> None:
    with folders_as_they_were([tmp_path / "new"]):
        (tmp_path / "new").mkdir()
        lock = FolderLock(Folder(tmp_path / "new"))
        lock.acquire()
    assert (tmp_path / "new" / LOCK_FILE).exists()
    lock.ensure()
    lock.release()
