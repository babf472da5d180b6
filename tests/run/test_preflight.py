"""A step that is tried out leaves nothing: the run is the same bits with and without."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_align import ExactResume
from lightning_align.run.preflight import no_preflight, preflight
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.resumable import WriteDown
from tests.helpers.resume import weights_hash

ROWS = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


class Stateful(pl.LightningModule):
    """Whatever a step can change: attributes, metrics, buffers, generators, logs, gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1)
        )
        self.mean = MeanMetric()
        self.seen: list[float] = []
        self.counts: Counter[str] = Counter()
        self.noise = torch.Generator().manual_seed(4)
        self.register_buffer("average", torch.zeros(1), persistent=False)
        self.stepped_in_backward = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.factor = 1.0 + batch_idx

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        noise = 0.1 * torch.randn(batch.shape, generator=self.noise)
        noise = noise + random.random() + float(np.random.rand())
        loss = self.body(batch + noise).square().mean() * self.factor
        self.mean.update(loss.detach())
        self.average.lerp_(loss.detach(), 0.5)
        self.seen.append(float(loss))
        self.counts[type(batch).__name__] += 1
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.logger.log_metrics({"own": float(loss)})
        return loss

    def configure_optimizers(self) -> Any:
        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(self.in_backward)
        return torch.optim.Adam(self.parameters(), lr=1e-2)

    def in_backward(self, parameter: nn.Parameter) -> None:
        self.stepped_in_backward += 1

    def train_dataloader(self) -> Any:
        return DataLoader(ROWS, batch_size=4, shuffle=True)


class TriesOut(pl.Callback):
    """Before the first batch, and before the second of a window."""

    def __init__(self, *at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx in self.at:
            before = [p.grad for p in pl_module.parameters()]
            preflight(trainer, pl_module, ROWS)
            assert all(p.grad is b for p, b in zip(pl_module.parameters(), before, strict=True))


def record(folder: Path, callback: pl.Callback | None, **options: Any) -> list[Any]:
    folder.mkdir()
    pl.seed_everything(3, verbose=False)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=CSVLogger(folder, version=""),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[ExactResume(), WriteDown(folder / "log"), *([callback] if callback else [])],
        **options,
    )
    module = Stateful()
    trainer.fit(module)
    facts = [module.seen, module.counts, module.average.tolist(), module.stepped_in_backward]
    written = next((path.read_text() for path in folder.rglob("metrics.csv")), "")
    draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    log = (folder / f"log.{trainer.global_rank}").read_text()
    return [log, weights_hash(module), facts, written, draws]


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_run_is_the_same_bits_with_and_without(accumulate: int, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": accumulate}
    theirs = record(tmp_path / "without", None, **options)
    ours = record(tmp_path / "with", TriesOut(0, 3), **options)
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_under_ddp_it_is_the_same_bits_as_well(accumulate: int, tmp_path: Path) -> None:
    """On each of two ranks, where backward reduces gradients and counts what is ready."""

    def on(rank: int) -> None:
        ranks = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        options = {"accumulate_grad_batches": accumulate, **ranks}
        theirs = record(tmp_path / f"without-{rank}", None, **options)
        ours = record(tmp_path / f"with-{rank}", TriesOut(0, 3), **options)
        assert len(ours[0].splitlines()) > 4
        assert ours == theirs

    run_ranks(on)


def test_what_a_step_meets_is_raised_and_leaves_nothing_either(tmp_path: Path) -> None:
    class Fails(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            with pytest.raises(RuntimeError, match="mat1 and mat2"):
                preflight(trainer, pl_module, ROWS[:, :5])

    assert record(tmp_path / "with", Fails()) == record(tmp_path / "without", None)


class Manual(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Draws(Stateful):
    def training_step(self, dataloader_iter: Any) -> Any:
        """Nothing."""


class Lazy(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.lazy = nn.LazyLinear(3)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Manual, "optimizes manually"),
        (Draws, "draws its batches itself"),
        (Lazy, "has parameters that its first step makes"),
        (Stateful, None),
    ],
)
def test_which_steps_cannot_be_tried_out(kind: Any, reason: str | None) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    found = no_preflight(trainer, kind())
    assert found is None if reason is None else reason in str(found)
