"""Runs with planted spikes: batches with a factor on the loss, and detectors that know when."""

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_align import SpikeGuard
from lightning_align.run.skipping import skip_batches, skipped_batches
from lightning_align.stability import SpikeDetector, SpikeVerdict


class AlarmAt(SpikeDetector):
    """Raises an alarm at some steps, and notes what it is told."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps: Collection[int] = steps
        self.seen: list[tuple[int, float, float | None]] = []
        self.told: list[str] = []

    def update(self, step: int, loss: float, grad_norm: float | None = None) -> SpikeVerdict:
        self.seen.append((step, loss, grad_norm))
        reason = "told" if step in self.steps else ""
        return SpikeVerdict(step, bool(reason), reason, loss, grad_norm)

    def planned_change(self, reason: str) -> None:
        self.told.append(reason)


class AlarmOnce(SpikeDetector):
    """Raises an alarm when it comes to some steps for the first time."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.left = list(steps)

    def update(self, step: int, loss: float, grad_norm: float | None = None) -> SpikeVerdict:
        reason = "told" if step in self.left else ""
        if reason:
            self.left.remove(step)
        return SpikeVerdict(step, bool(reason), reason, loss, grad_norm)


def rewinding(*alarms: int, **options: Any) -> SpikeGuard:
    """A guard that goes back at its alarms, to snapshots that it takes every two steps."""
    usual = {"rewind_steps": 1, "snapshot_every_n_steps": 2, "skip_batches": 0}
    return SpikeGuard("rewind", AlarmOnce(*alarms), **{**usual, **options})


class Told(pl.Callback):
    """Leaves batches out from the beginning, or notes at the end what was left out."""

    def __init__(self, ranges: Any = ()) -> None:
        self.ranges = ranges

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        skip_batches(trainer, self.ranges)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.ranges = skipped_batches(trainer).plain()


class Regression(pl.LightningModule):
    """Written by hand, knows nothing of us; the loss of a batch is multiplied by its factor."""

    def __init__(self, optimizer: Any = torch.optim.AdamW, lr: float = 1e-2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.make, self.lr = optimizer, lr

    def training_step(self, batch: tuple[torch.Tensor, float], batch_idx: int) -> torch.Tensor:
        x, factor = batch
        return (self.net(x) - x.sum(-1, keepdim=True)).square().mean() * factor

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters(), lr=self.lr)


def batches(count: int, **factors: float) -> list[tuple[torch.Tensor, float]]:
    """Batches of rows, some with a factor: ``batches(9, at4=1e3)``."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 4, generator=generator), factors.get(f"at{number}", 1.0))
        for number in range(count)
    ]
