"""What is saved and loaded under ZeROInfinityStrategy, and whole values in between."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_align import ExactResume
from tests.helpers.offloaded import ADAMW, Both, Regression, assert_same, fit, points, small


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_checkpoints_are_read_by_either_side(tmp_path, first, window):
    """Written in mid-epoch, with a window of accumulation that is open where it has two batches."""
    options = {"val_check_interval": 3, "accumulate_grad_batches": window}
    data = Both(DataLoader(points(), batch_size=8))
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    whole = Regression(ADAMW, schedule=True)
    begun = small() if first == "ours" else "auto"
    saving = {**options, "enable_checkpointing": True, "callbacks": [ExactResume(), save]}
    trainer = fit(tmp_path, whole, data, begun, **saving)
    expected = trainer.strategy.lightning_module_state_dict()
    states = trainer.strategy.optimizer_state(trainer.optimizers[0])
    path = tmp_path / f"step={3 // window}.ckpt"
    ended = Regression(ADAMW, schedule=True)
    second = "auto" if first == "ours" else small()
    trainer = fit(tmp_path, ended, data, second, path, callbacks=[ExactResume()], **options)
    assert_same(trainer.strategy.lightning_module_state_dict(), expected)
    assert_same(trainer.strategy.optimizer_state(trainer.optimizers[0]), states)


def test_edits_are_stored(tmp_path):
    strategy = small()
    module = Regression(ADAMW)
    fit(tmp_path, module, DataLoader(points(), batch_size=8), strategy)
    name = "parts.2.0.weight"
    with strategy.gathered([name], modify=True), torch.no_grad():
        with pytest.raises(RuntimeError, match="while it is not in memory"):
            module.parts[0][0].weight.isnan()
        module.parts[2][0].weight.fill_(2.0)
    found = strategy.lightning_module_state_dict()
    assert (found[name] == 2).all()
