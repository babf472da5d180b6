"""A rank fails: all ranks end within seconds, and say which stage, at what, and why."""

import os
import signal
import time
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.pipelines import Run
from tests.helpers.ranks import Ended, end_of_ranks

pytestmark = pytest.mark.slow  # `make test-laws` runs them

RUN = Run("chain", {"schedule": "1F1B", "num_microbatches": 4}, steps=6, data={"masked": False})


class Fault(nn.Module):
    """A layer that fails at its n-th forward or backward in this process."""

    def __init__(self, at: int, kind: str, backward: bool) -> None:
        super().__init__()
        self.calls, self.at, self.kind, self.backward = 0, at, kind, backward

    def happen(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("the cause")

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.backward:
            if torch.is_grad_enabled():  # not at set-up
                self.happen()
        elif hidden.requires_grad:
            hidden = hidden * 1
            hidden.register_hook(lambda _: self.happen())
        return hidden


def train(rank: int, stage: int, kind: str, backward: bool) -> None:
    run = RUN
    with run.setting(rank) as (trainer, _):
        module: Any = run.module()
        place = 1 if stage == 0 else 3
        fault = Fault(10, kind, backward)
        module.blocks[place] = nn.Sequential(module.blocks[place], fault)
        trainer.strategy.partition_method = [3, 3]
        trainer.fit(module, run.loader())


def fail(stage: int, kind: str, backward: bool) -> list[Ended]:
    start = time.monotonic()
    ended = end_of_ranks(lambda rank: train(rank, stage, kind, backward), timeout_s=60)
    assert time.monotonic() - start < 60
    assert not any(end.stuck for end in ended), "a rank survived"
    return ended


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("stage", [0, 1])
def test_an_exception_in_a_stage_ends_all_ranks(stage: int, backward: bool) -> None:
    ended = fail(stage, "raise", backward)
    # Its tenth: the second micro-batch of the third batch.
    action = f"{'backward' if backward else 'forward'} of micro-batch 1"
    told = f"rank {stage}, stage {stage}, {action}: ArithmeticError: the cause"
    assert f"PipelineError: {told}" in ended[stage].error
    other = ended[1 - stage]
    assert other.exit_code == 1
    assert f"has lost its peer. The failure was at {told}" in other.error
    # aim: 10 s; the machine may be busy
    assert abs(other.seconds - ended[stage].seconds) < 10


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_rank_ends_the_other(stage: int) -> None:
    ended = fail(stage, "kill", backward=False)
    assert ended[stage].exit_code == -signal.SIGKILL
    other = ended[1 - stage]
    assert other.exit_code == 1
    assert f"PipelineError: rank {1 - stage}, stage {1 - stage}," in other.error
    assert other.seconds - ended[stage].seconds < 10


class RaiseOn(pl.Callback):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == self.rank and batch_idx == 2:
            raise OSError("disk full")


@pytest.mark.parametrize("failing", [0, 1])
def test_an_exception_between_steps_ends_all_ranks(failing: int) -> None:
    run = replace(RUN, callbacks=[lambda: RaiseOn(failing)])
    ended = end_of_ranks(lambda rank: run.fit(rank), timeout_s=60)
    assert "OSError: disk full" in ended[failing].error
    other = ended[1 - failing]
    assert not other.stuck
    assert f"The failure was at rank {failing}, between steps: OSError: disk full" in other.error
    assert other.seconds - ended[failing].seconds < 10


def test_nan_on_the_last_stage_is_on_all_ranks() -> None:
    class Poisoned(pl.Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            weight = pl_module.head.weight
            if batch_idx == 2 and not weight.is_meta:
                with torch.no_grad():
                    weight.fill_(torch.nan)

    run = replace(RUN, trainer={"detect_anomaly": False}, callbacks=[Poisoned])
    ended = end_of_ranks(lambda rank: run.fit(rank), timeout_s=60)
    first, second = ([str(loss) for loss in end.result["losses"]] for end in ended)
    assert first == second
    assert first[2] == "nan"
