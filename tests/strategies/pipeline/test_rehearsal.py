"""What is told at set-up, and that finding it out changes nothing."""

import random
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from lightning_align import ExactResume
from lightning_align.strategies.pipeline import strategy
from lightning_align.strategies.pipeline.rehearsal import check_training_step
from tests.helpers.covers import with_slow
from tests.helpers.linear_chain import LINEAR, WIDTH, Foreign, InPlace, Trains, rows
from tests.helpers.pipelines import Batches, Chained, Run
from tests.helpers.ranks import run_ranks

RUN = Run("chain", {"schedule": "1F1B", "num_microbatches": 4}, steps=4, data={"masked": False})


def decorated(step: Any) -> Any:
    @wraps(step)
    def wrapper(*args: Any) -> Any:
        return step(*args)

    return wrapper


class Forgets(pl.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        def inner() -> int:
            return 1

        self.log("loss", inner() + (lambda: 1)())
        if batch is None:
            return
        for _ in batch:
            return None


class ForgetsDecorated(Forgets):
    @decorated
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("loss", 1)


class Returns(Forgets):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            if batch is not None:
                return self.sum(batch)
        return None


class Raises(Forgets):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise NotImplementedError


class Unreadable(Forgets):
    training_step = partial(int)  # a callable without source


@pytest.mark.parametrize("kind", [Forgets, ForgetsDecorated])
def test_a_step_without_a_loss_is_refused(kind: type[pl.LightningModule]) -> None:
    with pytest.raises(ValueError, match=r"Forgets.*\(training_step='...'\): must return its loss"):
        check_training_step(kind())


@pytest.mark.parametrize("kind", [Returns, Raises, Unreadable])
def test_a_step_that_may_return_one_is_not(kind: type[pl.LightningModule]) -> None:
    check_training_step(kind())


class Noisy(Dataset[dict[str, Tensor]]):
    """Rows drawn anew at each access, from all generators there are."""

    def __init__(self) -> None:
        self.rows = Batches(4, masked=False).batches

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {name: value[index % 8] for name, value in self.rows[index // 8].items()}
        shift = random.randrange(9) + int(np.random.randint(9)) + int(torch.randint(9, ()))
        return {**row, "labels": (row["labels"] + shift) % 101}


def loader(kind: str) -> DataLoader[Any]:
    if kind == "own generator":
        return DataLoader(Noisy(), 8, shuffle=True, generator=torch.Generator().manual_seed(5))
    if kind == "batch sampler":
        sampler = BatchSampler(RandomSampler(Noisy()), 8, drop_last=True)
        return DataLoader(Noisy(), batch_sampler=sampler)
    if kind == "workers":
        return DataLoader(Noisy(), 8, shuffle=True, num_workers=1, persistent_workers=True)
    return DataLoader(Noisy(), 8, shuffle=True)


KINDS = ["own generator", "batch sampler", "workers", "ExactResume"]


@pytest.mark.parametrize("kind", with_slow(KINDS, ["own generator", "workers"]))
def test_set_up_takes_nothing_from_the_data(kind: str) -> None:
    """The bits are the same without it, though every row depends on all draws before it."""
    run = replace(RUN, callbacks=[ExactResume] if kind == "ExactResume" else [])

    def train(rank: int, rehearsed: bool) -> list[float]:
        if not rehearsed:
            strategy.rehearse = lambda *_: None  # type: ignore[assignment]
        with run.setting(rank) as (trainer, seen):
            pl.seed_everything(11, verbose=False)
            trainer.fit(Chained(), loader(kind))
        return seen.losses

    theirs = run_ranks(lambda rank: train(rank, rehearsed=False))
    assert run_ranks(lambda rank: train(rank, rehearsed=True)) == theirs


def test_a_stage_that_needs_a_hook_of_training_is_no_failure() -> None:
    class Prepared(Chained):
        def on_train_start(self) -> None:
            self.scale = 1.0

        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * self.scale

    class Scaled(Prepared):
        def pipeline_inputs(self, batch: Any) -> Tensor:
            return (batch["input_ids"][:, :-1] * self.scale).long()

    def train(rank: int) -> list[float]:
        with RUN.setting(rank) as (trainer, seen):
            trainer.fit(Scaled(), RUN.loader())
        return seen.losses

    assert run_ranks(train)[0] == pytest.approx(replace(RUN, strategy=None).fit()["losses"])


class ValidatesOtherwise(Foreign):
    """It trains; only its validation does what cannot be cut."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.linear(self.model(batch[0]), self.model.first.weight).mean())


@pytest.mark.parametrize("sanity_steps", [0, 1])
def test_validation_is_rehearsed_before_anything_is_trained(sanity_steps: int) -> None:
    run = replace(LINEAR, trainer={"num_sanity_val_steps": sanity_steps})

    def refused(rank: int) -> None:
        told = "linear is given a weight of another stage"
        with run.setting(rank) as (trainer, _):
            trainer.callbacks.append(Trains())
            with pytest.raises(ValueError, match=told):
                trainer.fit(ValidatesOtherwise(), rows(), [rows(), rows()][: 1 + sanity_steps])

    run_ranks(refused)


@pytest.mark.parametrize("kind", [nn.utils.parametrizations.spectral_norm, nn.BatchNorm1d])
def test_what_differs_by_micro_batch_is_warned_of(kind: Any) -> None:
    class Normed(InPlace):
        def make(self) -> None:
            linear = nn.Linear(WIDTH, WIDTH)
            normed = nn.Sequential(linear, kind(WIDTH)) if kind is nn.BatchNorm1d else kind(linear)
            self.net = nn.Sequential(normed, nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def warns(rank: int) -> None:
        warning = r"spectral norm go by the statistics of one micro-batch: net\.0.* LayerNorm"
        told = pytest.warns(UserWarning, match=warning) if rank == 0 else nullcontext()
        with LINEAR.setting(rank) as (trainer, _), told:
            trainer.fit(Normed(), rows())

    run_ranks(warns)
