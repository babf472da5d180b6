"""Runs in one folder: the folder itself and its versions, in the order of their commits."""

from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from lightning_align.checkpointing import SnapshotEngine, latest_valid_checkpoint
from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.versions import version, versions


def save(dirpath: Any, step: int, commits_before: int = 0) -> None:
    with SnapshotEngine(dirpath, commits_before=commits_before) as engine:
        engine.save({"weight": torch.ones(2)}, f"step={step}", step)


def test_versions_are_folders_of_that_name_with_a_number_from_one(tmp_path: Path) -> None:
    for name in ("version_10", "version_2", "version_0", "version_02", "version_x", "other"):
        (tmp_path / name).mkdir()
    found = versions(Folder(tmp_path))
    assert list(found) == [0, 2, 10]
    assert [Path(each.root).name for each in found.values()][1:] == ["version_2", "version_10"]
    assert versions(Folder(tmp_path / "none")).keys() == {0}


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_the_newest_is_what_was_committed_last_in_any_version(tmp_path: Path, scheme: str) -> None:
    """Whichever has the higher number: an older run may have been resumed."""
    place = f"{scheme}{tmp_path}/runs"
    first, second = (str(version(Folder(place), number)) for number in (0, 1))
    save(place, 30)
    save(second, 2, commits_before=1)
    assert latest_valid_checkpoint(place) == f"{second}/step=2.ckpt"
    save(place, 31, commits_before=2)
    assert latest_valid_checkpoint(place) == f"{first}/step=31.ckpt"
    with fsspec.open(f"{first}/step=31.ckpt", "wb") as file:
        file.write(b"damaged")
    with pytest.warns(UserWarning, match=r"step=31.ckpt \(step 31\) is passed over"):
        assert latest_valid_checkpoint(place) == f"{first}/step=30.ckpt"
