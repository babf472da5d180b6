"""Files and folders that outlive a loss of power."""

import os
from pathlib import Path

import pytest

from lightning_align.durable import sync_path


def test_a_file_and_a_folder_are_forced_to_the_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    file = tmp_path / "file"
    file.write_text("text")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    sync_path(file)
    sync_path(tmp_path)
    assert synced == [file.stat().st_ino, tmp_path.stat().st_ino]
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        sync_path(tmp_path / "nothing")
