"""What set-up makes one on all ranks: generators, skipped steps, overflow."""

from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from lightning_align import StableAdamW
from tests.helpers.covers import with_slow
from tests.helpers.pipelines import Batches, Chained, Run
from tests.helpers.ranks import run_ranks

ONE_F_ONE_B = {"schedule": "1F1B", "num_microbatches": 4}
RUN = Run("chain", ONE_F_ONE_B, steps=4, data={"masked": False})


def test_shuffled_loaders_agree_without_a_seed() -> None:
    def train(rank: int) -> list[float]:
        torch.manual_seed(100 + rank)
        with RUN.setting(rank) as (trainer, seen):
            loader = DataLoader(Batches(4, masked=False), batch_size=None, shuffle=True)
            trainer.fit(Chained(), loader)
        return seen.losses

    first, second = run_ranks(train)
    assert first == second


class Overflow(pl.Callback):
    """Puts inf into a gradient of one rank, in one step."""

    def __init__(self, rank: int | None) -> None:
        self.rank = rank
        self.weights: list[float] = []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 1:
            layers = pl_module.embedding, pl_module.head  # of the first stage and of the last
            layers[self.rank].weight.grad.flatten()[0] = torch.inf

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        here = [p for p in pl_module.parameters() if not p.is_meta]
        self.weights.append(float(sum(p.detach().double().sum() for p in here)))


@pytest.mark.parametrize("failing", with_slow([0, 1], ["0"]))
def test_an_overflow_on_one_stage_skips_the_step_on_all(failing: int) -> None:
    def train(rank: int) -> tuple[list[float], float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        overflow = Overflow(failing)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        run = replace(RUN, trainer={"plugins": [plugin]}, callbacks=[lambda: overflow])
        run.fit(rank)
        return overflow.weights, scaler.get_scale()

    for weights, scale in run_ranks(train):
        assert weights[1] == weights[0], "the step was not skipped"
        assert weights[2] != weights[1]
        assert scale == 32.0


@pytest.mark.parametrize("failing", with_slow([0, 1], ["1"]))
def test_a_step_that_our_optimizer_skips_on_one_stage_is_skipped_on_all(failing: int) -> None:
    def train(rank: int) -> list[float]:
        overflow = Overflow(failing)
        replace(RUN, optimizer=partial(StableAdamW, lr=1e-2), callbacks=[lambda: overflow]).fit(
            rank
        )
        return overflow.weights

    for weights in run_ranks(train):
        assert weights[1] == weights[0], "the step was not skipped"
        assert weights[2] != weights[1]
