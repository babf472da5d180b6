"""Runs of small LightningModules that write down all that a resumed run must repeat."""

import logging
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_align import AsyncCheckpoint, ExactResume
from lightning_align.run.position import batches_consumed
from tests.helpers.children import in_child
from tests.helpers.foreign import consumed_in
from tests.helpers.resume import SaveEveryBatch, weights_hash

BATCHES = 6  # of an epoch


class Plain(pl.LightningModule):
    """A regression with dropout; what a test is about is in a subclass."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))

    def loss(self, batch: Any) -> torch.Tensor:
        rows = batch[0] if isinstance(batch, (list, tuple)) else batch
        return (self.body(rows) - rows.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> Any:
        rows = torch.randn(4 * BATCHES, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(rows, batch_size=4, shuffle=True)


class WithValidation(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def val_dataloader(self) -> Any:
        return DataLoader(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), 4)


class WriteDown(pl.Callback):
    """Loss and metrics of this rank after every batch, validation and epoch, to the last bit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, trainer: Any, what: str, **values: Any) -> None:
        metrics = {**trainer.callback_metrics, **values}
        exact = {name: float(value).hex() for name, value in sorted(metrics.items())}
        with Path(f"{self.path}.{trainer.global_rank}").open("a") as file:
            file.write(f"{batches_consumed(trainer)} {what} {exact}\n")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else 0.0
        self.write(trainer, "batch", loss=loss, lr=trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.write(trainer, "validation")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.write(trainer, "epoch")


class KillAt(pl.Callback):
    """SIGKILL to this process, before a batch."""

    def __init__(self, position: int) -> None:
        self.position = position

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if batches_consumed(trainer) == self.position:
            os.kill(os.getpid(), signal.SIGKILL)


def every_batch(folder: Path) -> list[pl.Callback]:
    return [ExactResume(), SaveEveryBatch()]


def model_checkpoint(folder: Path) -> list[pl.Callback]:
    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    return [ExactResume(), saving]


def after_validation(folder: Path) -> list[pl.Callback]:
    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    return [ExactResume(), saving]


def async_checkpoint(folder: Path) -> list[pl.Callback]:
    return [AsyncCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)]


@dataclass(frozen=True)
class Fit:
    """A run of three epochs on one process, or on the ranks that ``trainer`` asks for."""

    folder: Path
    module: Callable[[], pl.LightningModule]
    savers: Callable[[Path], list[pl.Callback]] = model_checkpoint
    callbacks: Callable[[], Sequence[pl.Callback]] = tuple
    trainer: dict[str, Any] = field(default_factory=dict)

    def run(
        self, name: str = "whole", *, ckpt_path: Path | None = None, **changes: Any
    ) -> list[str]:
        """What this rank wrote down, and a hash of the final weights."""
        torch.set_num_threads(1)
        for logger in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        path = self.folder / name
        saving = self.savers(self.folder) if ckpt_path is None else [ExactResume()]
        module = changes.pop("module", self.module)
        extra = changes.pop("extra", ())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?!ExactResume)")
            pl.seed_everything(3, verbose=False)
            trainer = pl.Trainer(
                **{
                    "max_epochs": 3,
                    "accelerator": "cpu",
                    "logger": False,
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                    "callbacks": [WriteDown(path), *self.callbacks(), *saving, *extra],
                    "enable_checkpointing": any(
                        isinstance(each, ModelCheckpoint) for each in saving
                    ),
                    "default_root_dir": self.folder,
                    **self.trainer,
                    **changes,
                }
            )
            built = module()
            trainer.fit(built, ckpt_path=str(ckpt_path) if ckpt_path else None)
        return [
            *Path(f"{path}.{trainer.global_rank}").read_text().splitlines(),
            weights_hash(built),
        ]

    def killed_at(self, position: int) -> None:
        """The run in a process that is killed before a batch."""
        code = in_child(lambda: self.run("killed", extra=[KillAt(position)]))
        assert code == -signal.SIGKILL

    def checkpoint(self, position: int) -> Path:
        """The checkpoint that was written after so many batches."""
        return next(p for p in self.folder.glob("*.ckpt") if consumed_in(p) == position)


def later(record: list[str], position: int) -> list[str]:
    """What was written after so many batches."""
    *lines, digest = record
    return [*(line for line in lines if int(line.split()[0]) > position), digest]


def resumes(fit: Fit, *positions: int) -> None:
    """The law: from the checkpoints of these positions the rest of the run is the same bits."""
    whole = fit.run()
    for position in positions:
        resumed = fit.run(f"from-{position}", ckpt_path=fit.checkpoint(position))
        assert later(resumed, position) == later(whole, position), f"from {position}"
