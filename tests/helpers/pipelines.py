"""Small runs of a pipeline on forked ranks, and the same run in one process."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset

from lightning_align import PipelineStrategy, PretrainModule
from lightning_align.data.sampler import PositionSampler
from lightning_align.run.position import batches_consumed
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.tiny_models import HIDDEN_SIZE, TINY_MODELS, VOCAB_SIZE, CausalBlock

ADAMW = partial(torch.optim.AdamW, lr=3e-3)


class Chained(pl.LightningModule):
    """Written by hand, knows nothing of us but the name of its chain; its loss is a mean."""

    def __init__(
        self, optimizer: Any = ADAMW, dropout: float = 0.0, num_blocks: int = 4, tied: bool = False
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
            self.blocks = nn.ModuleList(
                CausalBlock(HIDDEN_SIZE, 2, dropout) for _ in range(num_blocks)
            )
            self.head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.optimizer = optimizer

    def pipeline_layers(self) -> list[nn.Module]:
        return [self.embedding, *self.blocks, self.head]

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.pipeline_layers():
            tokens = layer(tokens)
        return tokens

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self(batch["input_ids"][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(batch["input_ids"][:, :-1])[:, -1].argmax(-1)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Batches(Dataset[dict[str, Tensor]]):
    """Batches of tokens; of two lengths, with a smaller last one, or with masked labels."""

    def __init__(
        self,
        count: int,
        *,
        varying: bool = False,
        ragged: bool = False,
        masked: bool = True,
        shifted: int = 0,
        backwards: int = 1,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.batches = []
        for number in range(count):
            rows = 3 if ragged and number % 5 == 4 else 8
            length = 13 if varying and number % 3 == 0 else 9
            ids = torch.randint(3, VOCAB_SIZE, (rows, length), generator=generator)
            labels = ids + shifted
            if masked:
                labels[torch.rand(rows, length, generator=generator) < 0.3] = -100
            positions = torch.arange(length).expand(rows, length) % 5  # packed documents
            batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
            # So many micro-batches, the last one first: the same batch, summed in another order.
            order = torch.arange(rows).reshape(backwards, -1).flip(0).flatten()
            self.batches.append({name: value[order] for name, value in batch.items()})

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        return self.batches[index[0] if isinstance(index, list) else index]


class PositionedBatches(pl.LightningDataModule):
    """Batches whose order follows the position of the run, as after a resume it must."""

    def __init__(self, count: int, **options: Any) -> None:
        super().__init__()
        self.batches = Batches(count, **options)

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = PositionSampler(
            len(self.batches), 1, position=lambda: batches_consumed(self.trainer)
        )
        return DataLoader(self.batches, sampler=sampler, batch_size=None)


class Seen(pl.Callback):
    """Losses of the steps, and what was logged with them."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        values = trainer.callback_metrics.items()
        self.logged.append({k: float(v) for k, v in values if k != "tokens_per_second"})


@dataclass(frozen=True)
class Run:
    """One short training run; ``strategy`` None is one process."""

    model: str = "chain"
    strategy: dict[str, Any] | None = None
    optimizer: Any = ADAMW
    accumulate: int = 1
    clip: float | None = None
    steps: int = 20
    data: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Callable[[], pl.Callback]] = ()

    def module(self) -> pl.LightningModule:
        """The module to train, the same one each time."""
        if self.model == "chain":
            return Chained(self.optimizer, **self.overrides)
        blocks = "n_layer" if self.model == "gpt2" else "num_hidden_layers"
        model = TINY_MODELS[self.model](**{blocks: 4, **self.overrides})
        return PretrainModule(model, optimizer=self.optimizer)

    def loader(self) -> DataLoader[Any]:
        """Its batches."""
        return DataLoader(Batches(self.steps, **self.data), batch_size=None)

    @contextmanager
    def setting(self, rank: int | None, ranks: int = 2) -> Any:
        """Trainer and what it has seen, without Lightning's talk."""
        spread: dict[str, Any] = {}
        if rank is not None:
            assert self.strategy is not None
            strategy = PipelineStrategy(**self.strategy)
            spread = {
                "devices": ranks,
                "strategy": strategy,
                "plugins": [ForkedRanks(rank, ranks), *self.trainer.get("plugins", [])],
            }
        seen = Seen()
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {
                "accelerator": "cpu",
                "max_epochs": 1,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "accumulate_grad_batches": self.accumulate,
                "gradient_clip_val": self.clip,
                "callbacks": [seen, *(make() for make in self.callbacks)],
                "devices": 1,
                **self.trainer,
                **spread,
            }
            yield pl.Trainer(**options), seen

    def fit(self, rank: int | None = None, ranks: int = 2, **options: Any) -> dict[str, Any]:
        """Train; what came of it, in plain numbers."""
        with self.setting(rank, ranks) as (trainer, seen):
            module = self.module()
            validation = DataLoader(
                Batches(3, ragged=True, masked=self.model != "chain"), batch_size=None
            )
            trainer.fit(module, self.loader(), validation, **options)
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {
            "losses": seen.losses,
            "logged": seen.logged,
            "metrics": metrics,
            "schedule": getattr(trainer.strategy, "schedule_in_use", None),
            "table": getattr(trainer.strategy, "table", None),
        }


def one_process(run: Run) -> dict[str, Any]:
    """The run without a pipeline."""
    return replace(run, strategy=None).fit()


def pipeline(run: Run, ranks: int = 2, timeout_s: float = 90.0) -> list[dict[str, Any]]:
    """The run on forked ranks, by rank."""
    return run_ranks(lambda rank: run.fit(rank, ranks), ranks, timeout_s)


def weights_of(path: Path) -> dict[str, Tensor]:
    """Parameters in a checkpoint."""
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state
