"""A run that resumes holds no more than one that begins: the limit holds at set-up, too."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers.children import in_child
from tests.helpers.offloaded import ADAMW, small, trainer_of

WIDTH, BLOCKS = 512, 12
PARAMETERS = BLOCKS * 2 * WIDTH * WIDTH
LIMIT = 15_000_000  # bytes: the least is 14.7 MB, in which a group has 4.2
NOISE = (
    20_000_000  # what code and allocator touch for the first time, by machine and what ran before
)


class Deep(pl.LightningModule):
    """Many blocks: 25 MB of values and 75 MB of states in fp32, of which a block has 2 and 6."""

    def __init__(self, width):
        super().__init__()
        two = lambda: [nn.Linear(width, width, bias=False) for _ in range(2)]  # noqa: E731
        self.parts = nn.ModuleList(nn.Sequential(*two()) for _ in range(BLOCKS))

    def training_step(self, batch, batch_idx):
        for part in self.parts:
            batch = part(batch)
        return batch.square().mean()

    def configure_optimizers(self):
        return ADAMW(self.parameters())


class Peak(pl.Callback):
    """Notes what this process had most of memory until training starts, and until it ends."""

    def on_train_start(self, *_):
        self.set_up = status_bytes("VmHWM")

    def on_train_end(self, *_):
        self.trained = status_bytes("VmHWM")


def train(folder, steps, precision, limit="auto", ckpt_path=None, width=WIDTH):
    strategy, peak = small(memory_limit=limit, nvme_path=str(folder / "nvme")), Peak()
    options = {"precision": precision, "max_steps": steps, "callbacks": [peak]}
    trainer = trainer_of(folder, strategy, **options)
    with trainer.init_module():
        module = Deep(width)
    data = DataLoader(list(torch.randn(4, width, dtype=next(module.parameters()).dtype)))
    trainer.fit(module, data, ckpt_path=ckpt_path)
    assert trainer.global_step == steps
    strategy.close()
    return peak


def status_bytes(key):
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_committed_step_is_resumed_in_a_fraction_of_its_states(tmp_path, precision):
    (tmp_path / "small").mkdir()
    train(tmp_path, 1, precision)

    def resume():
        train(tmp_path / "small", 1, precision, width=8)  # brings code into memory
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed here before would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")
        before = status_bytes("VmRSS")
        peak = train(tmp_path, 2, precision, LIMIT, "last")
        assert peak.set_up - before < LIMIT + NOISE  # the states alone are 75 MB
        assert peak.trained - before < 2 * LIMIT + NOISE  # gradients and activations come on top

    assert in_child(resume) == 0
