"""Small runs under ZeROInfinityStrategy, and the same in memory."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_align.strategies import ZeROInfinityStrategy
from tests.helpers.tiny_models import VOCAB_SIZE

STEPS = 6
ADAMW = partial(torch.optim.AdamW, lr=1e-2, fused=True)


def batches(rows=2, tokens=12, count=STEPS * 2):
    """Packed text with unequal numbers of labels, so that windows weigh batches unequally."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB_SIZE, (count * rows, tokens), generator=generator)
    labels = ids.clone()
    for row in range(len(ids)):
        labels[row, : row % 5] = -100
    return [{"input_ids": i, "labels": x} for i, x in zip(ids, labels, strict=True)]


def text(rows=2, count=STEPS * 2, batch_size=2, **options):
    """The same, as a loader of batches."""
    return DataLoader(batches(rows, count=count), batch_size, **options)


class Regression(pl.LightningModule):
    """A hand-written module: blocks in a Sequential, a mean loss, batch norm and dropout."""

    def __init__(self, build=ADAMW, width=20, schedule=False):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.inlet = nn.Linear(7, width)
            part = lambda: nn.Sequential(nn.Linear(width, 33), nn.Tanh(), nn.Linear(33, width))  # noqa: E731
            self.parts = nn.ModuleList([part() for _ in range(4)])
            self.norm = nn.BatchNorm1d(width)
            self.outlet = nn.Linear(width, 1)
        self.build, self.schedule = build, schedule

    def forward(self, x):
        x = self.inlet(x)
        for part in self.parts:
            x = x + part(x)
        return self.outlet(self.norm(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = self.build([p for p in self.parameters() if p.requires_grad])
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def points(batch_size=8, **options):
    """A loader of batches for ``Regression``."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * 8, 7, generator=generator)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    return DataLoader(data, batch_size, **options)


class Both(pl.LightningDataModule):
    """The same data to train on and to validate with."""

    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader

    val_dataloader = train_dataloader


def trainer_of(tmp_path, strategy, **options):
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy or "auto",
        default_root_dir=tmp_path,
        max_epochs=1,
        logger=options.pop("logger", False),
        enable_checkpointing=options.pop("enable_checkpointing", False),
        enable_progress_bar=options.pop("enable_progress_bar", False),
        enable_model_summary=False,
        **options,
    )


def fit(tmp_path, module, data, strategy=None, ckpt_path=None, **options):
    trainer = trainer_of(tmp_path, strategy, **options)
    pl.seed_everything(11)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def small(**arguments):
    """Two blocks in memory, the state of a few tensors."""
    return ZeROInfinityStrategy(params_buffer_count=2, sub_group_size=400, **arguments)


def compare(tmp_path, build_module, data, strategy=None, **options):
    """Both trainings; the states of parameters and optimizers must be the same, bit for bit."""
    theirs = build_module()
    trainer = fit(tmp_path, theirs, data, **options)
    expected, states = theirs.state_dict(), trainer.optimizers[0].state_dict()
    ours = build_module()
    trainer = fit(tmp_path, ours, data, strategy or small(), **options)
    found = trainer.strategy.lightning_module_state_dict()
    assert_same(found, expected)
    assert_same(trainer.strategy.optimizer_state(trainer.optimizers[0]), states)
    logged = dict(trainer.callback_metrics)
    trainer.strategy.close()
    return logged


def assert_same(ours, theirs, at=""):
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), at
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{at}.{key}")
    elif isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), f"{at}: {(ours - theirs).abs().max()}"
    elif isinstance(theirs, (list, tuple)):
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(mine, other, f"{at}[{number}]")
    else:
        assert ours == theirs, at
