"""Folders of parts; `tests/modules/test_fully_sharded.py` reads those that a run has written."""

import pytest
import torch
from torch.distributed import checkpoint

from lightning_align.models import sharded_folder
from lightning_align.models.sharded_folder import META_FILE, MODEL


@pytest.fixture
def folder(tmp_path):
    """What Lightning writes: DCP's files of the state, and a file of the rest."""
    state = {MODEL: {"a.weight": torch.arange(6.0).view(2, 3)}, "optimizer_0": {"step": 3}}
    checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
    torch.save({"global_step": 7}, tmp_path / META_FILE)
    return tmp_path


def test_it_is_read_without_its_optimizers(folder):
    assert sharded_folder.is_one(folder)
    found = sharded_folder.read(folder, "export")
    assert found["global_step"] == 7
    assert "optimizer_0" not in found
    assert torch.equal(found[MODEL]["a.weight"], torch.arange(6.0).view(2, 3))


def test_other_folders_are_none(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert not sharded_folder.is_one(tmp_path / "empty")
    (folder / META_FILE).unlink()
    assert not sharded_folder.is_one(folder)


def test_a_file_that_was_cut_off_is_refused(folder):
    for path in folder.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:8])
    with pytest.raises(ValueError, match=r"export\(ckpt='.*'\): its files cannot be read as plain"):
        sharded_folder.read(folder, "export")
