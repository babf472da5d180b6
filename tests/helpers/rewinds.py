"""A callback that goes back to an earlier batch in the middle of a fit."""

from typing import Any

import lightning.pytorch as pl

from lightning_align.run.capture import RunState, capture, restore
from lightning_align.run.position import batches_consumed


class Rewinds(pl.Callback):
    """Captures after one batch, and goes back there after another, some times."""

    def __init__(self, at: int, until: int, times: int) -> None:
        self.at, self.until, self.times = at, until, times
        self.state: RunState | None = None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        position = batches_consumed(trainer)
        if position == self.at and self.state is None:
            self.state = capture(trainer)
        if position == self.until and self.times:
            self.times -= 1
            assert self.state is not None
            restore(trainer, self.state)
            assert batches_consumed(trainer) == self.at
