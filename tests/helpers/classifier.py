"""A foreign classifier and its fit: what monitors and hooks see of it, here and on two ranks."""

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.pipelines import Run
from tests.helpers.ranks import run_ranks

CLASSES = 3
RUN = Run("chain", {"schedule": "1F1B", "num_microbatches": 4}, steps=3)


def rows(count: int = 32, batch_size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(count, 6, generator=generator)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    masked = torch.rand(count, generator=generator) < 0.4
    return DataLoader(TensorDataset(inputs, targets, masked), batch_size)


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, CLASSES))
        self.made()

    def made(self) -> None:
        pass

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.3)


def fit(make: type[Classifier], rank: int | None, **trainer: Any) -> Any:
    """Two epochs; what monitors and the module's hooks have seen, and the learning rates."""
    run = replace(RUN, trainer={"max_epochs": 2, **trainer})
    with run.setting(rank) as (fitting, seen):
        module = make()
        # The last batch is smaller, and cut into fewer parts.
        fitting.fit(module, rows(28), rows(22))
        metrics = {name: float(value) for name, value in fitting.callback_metrics.items()}
        rates = [group["lr"] for group in fitting.optimizers[0].param_groups]
        left = {name: value for name, value in vars(module).items() if name.startswith("kept")}
    return {"losses": seen.losses, "logged": seen.logged, "metrics": metrics, "lr": rates}, left


def same_as_one_process(make: type[Classifier]) -> dict[str, Any]:
    """Every rank has what one process has; returns that."""
    theirs, theirs_left = fit(make, None)
    for ours, ours_left in run_ranks(lambda rank: fit(make, rank)):
        assert ours["lr"] == theirs["lr"]
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
        assert ours["metrics"] == pytest.approx(theirs["metrics"], abs=1e-5)
        for our, their in zip(ours["logged"], theirs["logged"], strict=True):
            assert our == pytest.approx(their, abs=1e-5)
        assert ours_left.keys() == theirs_left.keys()
        for name, value in theirs_left.items():
            torch.testing.assert_close(ours_left[name], value, atol=1e-5, rtol=1e-5)
    return theirs


class AddsNoise(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs = batch[0] + torch.randn_like(batch[0])
        return F.cross_entropy(self.net(inputs), batch[1])
