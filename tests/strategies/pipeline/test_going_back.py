"""Ranks that each hold stages go back to an earlier batch, each with its own, and to the bit."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import distributed

from lightning_align import ExactResume, Muon
from lightning_align.run.capture import capture, restore
from tests.helpers.pipelines import Run, one_process
from tests.helpers.ranks import run_ranks
from tests.helpers.rewinds import Rewinds
from tests.helpers.spiky import Told, rewinding


def digest(value: Any) -> str:
    """Of what a rank has of nested state, to the last bit."""
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            return "elsewhere"
        content = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(content).hexdigest()
    if isinstance(value, dict):
        return str({key: digest(item) for key, item in value.items()})
    return repr([digest(x) for x in value] if isinstance(value, (list, tuple)) else value)


class Record(pl.Callback):
    """Loss, what is logged, and this rank's part of the state, after every batch."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        with torch._C.DisableTorchFunction():
            gradients = [p.grad for p in pl_module.parameters() if not p.is_meta]
            state = trainer.strategy.snapshot_state()
            metrics = {k: v for k, v in trainer.callback_metrics.items() if "per_second" not in k}
            self.lines.append(
                f"{trainer.global_step} {digest((outputs, state, gradients, metrics))}"
            )


def goes_back(run: Run, at: int, until: int) -> None:
    """The law, on this rank."""

    def recorded(rank: int, *more: pl.Callback) -> list[str]:
        record = Record()
        with run.setting(rank) as (trainer, _):
            trainer.callbacks = [ExactResume(), record, *more, *trainer.callbacks]
            trainer.fit(run.module(), run.loader())
        return record.lines

    def on(rank: int) -> None:
        whole, ours = recorded(rank), recorded(rank, Rewinds(at, until, times=2))
        expected = [*whole[:until], *whole[at:until], *whole[at:]]
        for number, (one, other) in enumerate(zip(ours, expected, strict=True)):
            assert one == other, f"rank {rank}, line {number}"

    run_ranks(on, timeout_s=120.0)


WHOLE = {"masked": False}
ONE = {"schedule": "1F1B", "num_microbatches": 4}
SEVERAL = {"schedule": "Interleaved1F1B", "num_microbatches": 4}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [ONE, SEVERAL], ids=["1F1B", "Interleaved1F1B"])
@pytest.mark.parametrize(
    "options",
    [
        {"data": WHOLE, "overrides": {"dropout": 0.2, "tied": True}},
        {
            "data": WHOLE,
            "accumulate": 3,
            "clip": 0.5,
        },  # from a window that is open, into another one
        {"model": "gpt2", "accumulate": 2},
        {"model": "llama", "optimizer": partial(Muon, lr=0.01)},
    ],
    ids=str,
)
def test_each_rank_goes_back_with_its_stages(
    strategy: dict[str, Any], options: dict[str, Any]
) -> None:
    goes_back(Run(strategy=strategy, steps=8, **options), 2, 5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [ONE, SEVERAL], ids=["1F1B", "Interleaved1F1B"])
@pytest.mark.parametrize(
    "options", [{"data": WHOLE, "overrides": {"dropout": 0.2}}, {"model": "llama"}], ids=str
)
def test_a_guard_rewinds_all_ranks_as_if_told_what_to_leave_out(
    strategy: dict[str, Any], options: dict[str, Any]
) -> None:
    def on(rank: int) -> None:
        def recorded(told: Told, *alarms: int) -> list[str]:
            record, run = Record(), Run(strategy=strategy, steps=10, accumulate=2, **options)
            with run.setting(rank) as (trainer, _):
                ours = [ExactResume(), record, rewinding(*alarms), told]
                trainer.callbacks = [*ours, *trainer.callbacks]
                trainer.fit(run.module(), run.loader())
            return record.lines

        notes = Told()
        ours = recorded(notes, 3)
        assert notes.ranges == [[4, 8]]
        theirs = recorded(Told(notes.ranges))
        assert ours[8:] == theirs[4:]  # behind the window of the alarm, and behind step 2

    run_ranks(on, timeout_s=120.0)


@pytest.mark.slow
def test_behind_a_rewind_learning_rate_and_moments_are_those_of_one_process() -> None:
    def make() -> pl.Callback:
        return rewinding(3, lr_factor=0.3, lr_steps=2, moments="reset")

    run = Run(strategy=ONE, steps=9, data=WHOLE, callbacks=(ExactResume, make))
    theirs = one_process(run)["losses"]
    assert len(theirs) == 9 + 2
    for ours in run_ranks(lambda rank: run.fit(rank)["losses"], timeout_s=120.0):
        # Sums in another order; steps of fresh moments are the largest that there are.
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_nothing_is_sent_and_each_rank_keeps_its_own_stages_only() -> None:
    class Once(pl.Callback):
        kept = 0

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                send, distributed.send = distributed.send, None
                state = capture(trainer)
                distributed.send = send
                values = state.checkpoint["state_dict"].values()
                self.kept = sum(value.numel() for value in values if not value.is_meta)
                restore(trainer, state)

    def on(rank: int) -> tuple[int, int]:
        once = Once()
        run = Run(strategy=ONE, steps=3, data=WHOLE)
        with run.setting(rank) as (trainer, _):
            trainer.callbacks = [ExactResume(), once, *trainer.callbacks]
            module = run.module()
            total = sum(p.numel() for p in module.parameters())
            trainer.fit(module, run.loader())
        return once.kept, total

    (first, total), (second, _) = run_ranks(on)
    assert first + second == total
    assert min(first, second) > total / 4
