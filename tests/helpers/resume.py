"""A run that records every loss, may be killed from outside, and resumed.

As a program: ``python -m tests.helpers.resume '{"folder": ..., "module": "gpt2", ...}'``.
"""

import hashlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from lightning_align.data.sampler import PositionSampler
from lightning_align.run.exact_resume import ExactResume
from lightning_align.run.position import batches_consumed

VOCABULARY = 61
NUM_SAMPLES = 38  # not a multiple of the batch size: the last batch of a pass is smaller
BATCH_SIZE = 4


class Sequences:
    """Token sequences, looked up by a list of indices; a negative index learns nothing."""

    def __init__(self, length: int = 13) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(VOCABULARY, (NUM_SAMPLES, length), generator=generator)
        # Unequal numbers of targets per sample, so that weighting by tokens matters.
        self.kept = torch.randint(2, length, (NUM_SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = [index if index >= 0 else -index - 1 for index in indices]
        labels = self.tokens[rows].clone()
        labels[torch.arange(labels.shape[1]) > self.kept[rows, None]] = -100
        labels[torch.tensor([index < 0 for index in indices])] = -100
        return {"input_ids": self.tokens[rows], "labels": labels}


class SequenceData(pl.LightningDataModule):
    """A datamodule by hand over the sampler seam."""

    def __init__(self, num_workers: int = 0, seed: int = 3) -> None:
        super().__init__()
        self.num_workers, self.seed = num_workers, seed

    @property
    def position(self) -> int:
        return batches_consumed(self.trainer)  # type: ignore[arg-type]

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        self.train_sampler = PositionSampler(
            NUM_SAMPLES,
            BATCH_SIZE,
            seed=self.seed,
            num_replicas=trainer.world_size,
            rank=trainer.global_rank,
            position=lambda: self.position,
        )
        return self._loader(self.train_sampler)

    def val_dataloader(self) -> Any:
        sampler = PositionSampler(
            NUM_SAMPLES,
            BATCH_SIZE,
            shuffle=False,
            num_replicas=self.trainer.world_size,
            rank=self.trainer.global_rank,
        )
        return self._loader(sampler)

    def _loader(self, sampler: PositionSampler) -> Any:
        return DataLoader(
            Sequences(), sampler=sampler, batch_size=None, num_workers=self.num_workers
        )


class HandWritten(pl.LightningModule):
    """A LightningModule that knows nothing of us."""

    def __init__(self, reads_stepping_batches: bool = False, scheduler: bool = True) -> None:
        super().__init__()
        self.scheduler = scheduler
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(32, VOCABULARY)
        self.reads_stepping_batches = reads_stepping_batches

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self.head(self.body(self.embedding(batch["input_ids"][:, :-1])))
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        return torch.nan_to_num(loss)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx) + torch.rand(()))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self.reads_stepping_batches:
            assert self.trainer.estimated_stepping_batches > 0
        if not self.scheduler:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def gpt2_module(scheduler: bool = True) -> pl.LightningModule:
    """Our module on GPT-2 with dropout and a schedule."""
    from transformers import GPT2Config

    from lightning_align import PretrainModule

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2, pad_token_id=0
    )
    return PretrainModule(
        config,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        lr_scheduler=(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97))
        if scheduler
        else None,
    )


MODULES = {
    "hand-written": HandWritten,
    "stepping-batches": lambda: HandWritten(reads_stepping_batches=True),
    "gpt2": gpt2_module,
    "hand-written, no scheduler": lambda: HandWritten(scheduler=False),
    "gpt2, no scheduler": lambda: gpt2_module(scheduler=False),
}


def callback(name: str, arguments: dict[str, Any]) -> pl.Callback:
    """One of our callbacks, so that a run can be a program of its own with it."""
    import lightning_align

    return getattr(lightning_align, name)(**arguments)  # type: ignore[no-any-return]


class Recorder(pl.Callback):
    """Appends (position, loss to the last bit) of this rank to a file after every batch."""

    def __init__(self, path: str, pause_s: float = 0.0) -> None:
        self.path, self.pause_s = path, pause_s

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line = f"{batches_consumed(trainer)} {float(outputs['loss']).hex()}\n"
        with Path(f"{self.path}.{trainer.global_rank}").open("a") as file:
            file.write(line)
        time.sleep(self.pause_s)


class SaveEveryBatch(pl.Callback):
    """A user's own callback that saves whenever it likes, also between optimizer steps."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        folder = trainer.default_root_dir
        trainer.save_checkpoint(f"{folder}/batch={batches_consumed(trainer)}.ckpt")


@dataclass
class Run:
    """What to train and how; the defaults are a short run on one process."""

    folder: str
    module: str = "hand-written"
    name: str = "losses"
    max_epochs: int = 3
    num_workers: int = 0
    devices: int = 1
    pause_s: float = 0.0
    ckpt_path: str | None = None
    exact_resume: bool = True
    save_every_batch: bool = False
    checkpoint: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> arguments

    def fit(self) -> tuple[list[str], str]:
        """Losses as text, one line per batch, and a hash of the final weights."""
        torch.set_num_threads(1)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        pl.seed_everything(5, verbose=False)
        module = MODULES[self.module]()
        path = Path(self.folder, self.name)
        callbacks: list[pl.Callback] = [Recorder(str(path), self.pause_s)]
        callbacks += [callback(name, options) for name, options in self.callbacks.items()]
        if self.exact_resume:
            callbacks.append(ExactResume())
        if self.checkpoint:
            callbacks.append(ModelCheckpoint(self.folder, save_top_k=-1, **self.checkpoint))
        if self.save_every_batch:
            callbacks.append(SaveEveryBatch())
        distributed = {"strategy": "ddp_fork", "devices": self.devices} if self.devices > 1 else {}
        trainer = pl.Trainer(
            max_epochs=self.max_epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(self.checkpoint),
            callbacks=callbacks,
            default_root_dir=self.folder,
            **distributed,
            **self.trainer,
        )
        trainer.fit(module, SequenceData(self.num_workers), ckpt_path=self.ckpt_path)
        digest = weights_hash(module)
        Path(f"{path}.hash").write_text(digest)
        return self.losses(), digest

    def losses(self, rank: int = 0) -> list[str]:
        return Path(self.folder, f"{self.name}.{rank}").read_text().splitlines()

    def command(self) -> list[str]:
        """This run as a program of its own."""
        return [sys.executable, "-m", "tests.helpers.resume", json.dumps(asdict(self))]


def weights_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        digest.update(name.encode() + value.detach().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    Run(**json.loads(sys.argv[1])).fit()
