"""Where a run stands: the number of training batches whose step is complete.

One integer, derived from the trainer's own progress so that it cannot drift from it. Lightning
saves that progress in every checkpoint, advances it before ``on_train_batch_end`` (where
checkpoints are written) and leaves it alone when a batch is interrupted, so "consumed" always means
"is part of the weights".
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl


class Place(NamedTuple):
    """Where the next batch comes from: an epoch, and the number of its batches already consumed."""

    epoch: int
    batch: int


def batches_consumed(trainer: pl.Trainer) -> int:
    """Training batches that this run has consumed so far, over all epochs (on each rank)."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(total.processed)


def next_place(fit_loop: Mapping[str, Any]) -> Place:
    """Where a run goes on that is resumed from a checkpoint.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``: Lightning's own counters.
    """
    epochs: Mapping[str, int] = fit_loop["epoch_progress"]["current"]
    batches: Mapping[str, Any] = fit_loop["epoch_loop.batch_progress"]
    consumed = int(batches["current"]["processed"])
    epoch_is_closed = epochs["processed"] == epochs["started"]
    if batches["is_last_batch"] or consumed == 0:
        return Place(epochs["processed"] + (not epoch_is_closed and consumed > 0), 0)
    # ``max_steps`` closes an epoch before its end; Lightning resumes with what is left of it.
    return Place(epochs["processed"] - epoch_is_closed, consumed)
