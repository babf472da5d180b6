"""A LightningModule and loaders that know nothing of us, and a run that writes everything down.

As a program: ``python -m tests.helpers.foreign '{"folder": ..., "loader": "workers", ...}'``.
"""

import json
import logging
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric

from lightning_align import ExactResume
from tests.helpers.read_checkpoint import read_checkpoint
from tests.helpers.resume import SaveEveryBatch, weights_hash

NUM_ROWS, BATCH_SIZE = 22, 4  # 6 batches an epoch, the last one smaller


class Rows(Dataset):
    """Rows with noise from all three generators, as augmentation would draw it."""

    def __init__(self) -> None:
        self.rows = torch.randn(NUM_ROWS, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index] + 0.1 * torch.randn(8) + 0.1 * float(np.random.rand())


class Stream(IterableDataset):
    """The same without a length, shuffled by the global generator."""

    def __iter__(self):
        rows = Rows()
        worker = torch.utils.data.get_worker_info()
        for index in torch.randperm(NUM_ROWS).tolist():
            if worker is None or index % worker.num_workers == worker.id:
                yield rows[index]


class Resumable:
    """A loader that can tell and restore where it stands; its length may be unknown."""

    def __init__(self, sized: bool) -> None:
        self.rows, self.next, self.order, self.restored = Rows().rows, 0, [], False
        if sized:
            self.__class__ = SizedResumable

    def __iter__(self):
        if not self.restored:
            self.order, self.next = torch.randperm(NUM_ROWS).tolist(), 0
        self.restored = False
        while self.next < NUM_ROWS:
            chosen = self.order[self.next : self.next + BATCH_SIZE]
            self.next = min(self.next + BATCH_SIZE, NUM_ROWS)
            yield self.rows[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next, self.order, self.restored = state["next"], state["order"], True


class SizedResumable(Resumable):
    def __len__(self) -> int:
        return -(-NUM_ROWS // BATCH_SIZE)


def loader(name: str) -> Any:
    """One of the loaders that a run of a stranger may have."""
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "shuffle": True}
    workers = {"num_workers": 2, "multiprocessing_context": "fork"}
    makers = {
        "shuffled": lambda: DataLoader(Rows(), **options),
        "generator": lambda: DataLoader(
            Rows(), **options, generator=torch.Generator().manual_seed(11)
        ),
        "workers": lambda: DataLoader(Rows(), **options, **workers),
        "persistent": lambda: DataLoader(Rows(), **options, **workers, persistent_workers=True),
        "stream": lambda: DataLoader(Stream(), batch_size=BATCH_SIZE),
        "stream-workers": lambda: DataLoader(Stream(), batch_size=BATCH_SIZE, **workers),
        "stateful": lambda: Resumable(sized=True),
        "stateful-stream": lambda: Resumable(sized=False),
        "one-batch": lambda: DataLoader(Rows(), batch_size=NUM_ROWS),
        "two": lambda: [DataLoader(Rows(), **options), DataLoader(Rows(), batch_size=7)],
        "mixed": lambda: [Resumable(sized=True), DataLoader(Rows(), **options)],
    }
    return makers[name]()


class Stranger(pl.LightningModule):
    """A regression with dropout, whose every number depends on the draws and the order."""

    def __init__(
        self, loader_name: str = "shuffled", reads_stepping_batches: bool = False, plateau: str = ""
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1))
        self.mean_loss = MeanMetric()
        self.loader_name, self.reads_stepping_batches = loader_name, reads_stepping_batches
        self.plateau = plateau  # interval of its scheduler

    def step(self, batch: Any) -> torch.Tensor:
        rows = torch.cat(batch) if isinstance(batch, list) else batch
        return (self.body(rows) - rows.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.step(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=BATCH_SIZE)
        self.log("worst", loss, on_step=False, on_epoch=True, reduce_fx="max", batch_size=1)
        self.mean_loss.update(loss.detach())
        self.log("metric", self.mean_loss, on_step=False, on_epoch=True)
        if batch_idx == 1:
            self.log("seldom", loss, on_step=False, on_epoch=True, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch) + torch.rand(()), batch_size=1)

    def configure_optimizers(self) -> Any:
        if self.reads_stepping_batches:
            assert self.trainer.estimated_stepping_batches > 0
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self.plateau:
            reduce = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0)
            monitor = "loss_epoch" if self.plateau == "epoch" else "loss"
            config = {"scheduler": reduce, "interval": self.plateau, "monitor": monitor}
            return {"optimizer": optimizer, "lr_scheduler": config}
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def train_dataloader(self) -> Any:
        return loader(self.loader_name)

    def val_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_size=BATCH_SIZE, shuffle=True)


class WriteDown(pl.Callback):
    """Every loss and every epoch mean of this rank, to the last bit, by number of batches."""

    def __init__(self, path: str, pause_s: float = 0.0) -> None:
        self.path, self.pause_s = path, pause_s

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.write(trainer, f"loss {float(outputs['loss']).hex()}")
        time.sleep(self.pause_s)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        names = ("loss_epoch", "worst", "metric", "seldom", "val_loss")
        metrics = trainer.callback_metrics
        values = {name: float(metrics[name]).hex() for name in names if name in metrics}
        self.write(trainer, f"epoch {json.dumps(values)}")

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.write(trainer, f"start {float(torch.rand(())).hex()}")

    def write(self, trainer: Any, text: str) -> None:
        consumed = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        with Path(f"{self.path}.{trainer.global_rank}").open("a") as file:
            file.write(f"{consumed} {text}\n")


@dataclass
class ForeignRun:
    """What to train on and how; the defaults are two short epochs on one process."""

    folder: str
    loader: str = "shuffled"
    name: str = "record"
    devices: int = 1
    pause_s: float = 0.0
    ckpt_path: str | None = None
    exact_resume: bool = True
    save_every_batch: bool = False
    checkpoint: dict[str, Any] = field(default_factory=dict)  # of ModelCheckpoint
    async_checkpoint: dict[str, Any] = field(default_factory=dict)  # of AsyncCheckpoint
    module: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def fit(self) -> "ForeignRun":
        torch.set_num_threads(1)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        callbacks: list[pl.Callback] = [WriteDown(str(self.path), self.pause_s)]
        if self.exact_resume:
            callbacks.append(ExactResume())
        if self.checkpoint:
            callbacks.append(ModelCheckpoint(self.folder, save_top_k=-1, **self.checkpoint))
        if self.async_checkpoint:
            from lightning_align import AsyncCheckpoint

            callbacks.append(AsyncCheckpoint(**self.async_checkpoint))
        if self.save_every_batch:
            callbacks.append(SaveEveryBatch())
        distributed = {"strategy": "ddp_fork", "devices": self.devices} if self.devices > 1 else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pl.seed_everything(5, verbose=False)
            module = Stranger(self.loader, **self.module)
            trainer = pl.Trainer(
                **{
                    "max_epochs": 3,
                    "accelerator": "cpu",
                    "logger": False,
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                    "enable_checkpointing": bool(self.checkpoint or self.async_checkpoint),
                    "callbacks": callbacks,
                    "default_root_dir": self.folder,
                    **distributed,
                    **self.trainer,
                }
            )
            trainer.fit(module, ckpt_path=self.ckpt_path)
        Path(f"{self.path}.hash").write_text(weights_hash(module))
        return self

    @property
    def path(self) -> Path:
        return Path(self.folder, self.name)

    def record(self, after: int = 0, rank: int = 0) -> list[str]:
        """Lines written after ``after`` batches, and the hash of the weights."""
        lines = Path(f"{self.path}.{rank}").read_text().splitlines()
        later = [line for line in lines if int(line.split()[0]) > after]
        return [*later, Path(f"{self.path}.hash").read_text()]

    def resumed(self, ckpt_path: str | Path, **changes: Any) -> "ForeignRun":
        """The run that goes on from a checkpoint and writes none."""
        changes = {"checkpoint": {}, "async_checkpoint": {}, "save_every_batch": False, **changes}
        name = f"resumed-{Path(ckpt_path).stem}"
        return replace(self, name=name, ckpt_path=str(ckpt_path), pause_s=0.0, **changes)

    def command(self) -> list[str]:
        """This run as a program of its own."""
        return [sys.executable, "-m", "tests.helpers.foreign", json.dumps(asdict(self))]


def consumed_in(checkpoint: str | Path) -> int:
    """Batches that are part of a checkpoint."""
    loops = read_checkpoint(checkpoint)["loops"]["fit_loop"]
    return int(loops["epoch_loop.batch_progress"]["total"]["processed"])


if __name__ == "__main__":
    ForeignRun(**json.loads(sys.argv[1])).fit()
