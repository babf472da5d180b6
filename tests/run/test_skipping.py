"""Batches left out in mid-run: as if the run had been told before it began, bit for bit."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_align.run.capture import RunState, capture, restore
from lightning_align.run.skipping import (
    skip_batches,
    stream_position,
)
from tests.run.test_capture import Parts, everything, fit

Ranges = list[tuple[int, int]]


class Told(pl.Callback):
    """Passes over ranges from the start, or in the middle."""

    def __init__(self, ranges: Ranges, after: int = 0) -> None:
        self.ranges, self.after = ranges, after
        self.positions: list[int] = []

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        if self.after == 0:
            skip_batches(trainer, self.ranges)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.positions.append(stream_position(trainer))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.after == len(self.positions):
            skip_batches(trainer, self.ranges)


class GoesBack(pl.Callback):
    """After batch ``until`` it goes back to ``at`` and leaves out what came between, and more."""

    def __init__(self, *jumps: tuple[int, int, int]) -> None:
        self.jumps = list(jumps)
        self.states: dict[int, RunState] = {}
        self.before: dict[int, int] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        position = stream_position(trainer)
        if not self.jumps:
            return
        at, until, more = self.jumps[0]
        if position == at:
            self.states[at] = capture(trainer)
        if position == until:
            self.jumps.pop(0)
            restore(trainer, self.states[at])
            skip_batches(trainer, [(at, until + more)])
            self.went_back(trainer)

    def went_back(self, trainer: Any) -> None:
        """For a test to look at."""


def run(build: Callable[[], Parts], *callbacks: pl.Callback, **options: Any) -> list[str]:
    pl.seed_everything(3, verbose=False)
    module, others, data = build()
    return fit(module, *others, *callbacks, data=data, **options)


def told_before_and_in_the_middle(
    build: Callable[[], Parts], ranges: Ranges, after: int, **options: Any
) -> list[int]:
    """The law; returns the numbers of the batches that were trained."""
    before, later = Told(ranges), Told(ranges, after)
    assert run(build, before, **options) == run(build, later, **options)
    assert before.positions == later.positions
    return before.positions


@pytest.mark.parametrize("loader", ["shuffled", "stateful", "stream", "stateful-stream"])
def test_told_in_mid_epoch(loader: str) -> None:
    positions = told_before_and_in_the_middle(lambda: everything(loader), [(3, 5), (8, 9)], after=2)
    kept = [n for n in range(100) if n not in {3, 4, 8}]
    assert positions == kept[: len(positions)]
