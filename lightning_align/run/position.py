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


def begin_interrupted_epoch_anew(trainer: pl.Trainer) -> None:
    """Forget an epoch that an exception ended in an earlier ``fit`` of this Trainer.

    Lightning begins it anew, but counts it as one more that was started: no later epoch would ever
    look closed, neither to what saves at its end nor to whoever resumes from there.
    """
    for counters in (
        trainer.fit_loop.epoch_progress.total,
        trainer.fit_loop.epoch_progress.current,
    ):
        counts: Any = counters
        counts.ready = counts.started = counts.processed


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


def close_epoch(fit_loop: dict[str, Any]) -> None:
    """Let a run that is resumed behind the last batch of an epoch begin the next one, in place.

    Lightning reads such counters in several ways. With ``max_steps`` it trains one batch more in
    the epoch that has ended, and with a loader without length it goes on counting from there.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]`` with ``next_place(fit_loop).batch == 0``.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    was_open = epochs["current"]["processed"] != epochs["current"]["started"]
    for counters in (epochs["total"], epochs["current"]):
        counters.update(dict.fromkeys(counters, counters["processed"] + was_open))
    if was_open:  # Lightning counts the batch for the loggers after it was saved
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    batches["total"].update(dict.fromkeys(batches["total"], batches["total"]["processed"]))
    batches["current"].update(dict.fromkeys(batches["current"], 0))
    batches["is_last_batch"] = False
    fit_loop["state_dict"].pop("combined_loader", None)  # at its end; the next one is a new one


def epoch_is_open(fit_loop: Mapping[str, Any]) -> bool:
    """Whether the hooks of an epoch's end have yet to run.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``.
    """
    epochs: Mapping[str, int] = fit_loop["epoch_progress"]["current"]
    return epochs["processed"] != epochs["started"]


def leave_validation_to_do(fit_loop: dict[str, Any]) -> None:
    """Let a resumed run begin behind its last batch with what followed it there, in place.

    What a batch still had before it when it was saved, Lightning leaves out: the validation that
    was due, and at an epoch's end its hooks. It comes to them where its counters say that the batch
    is over and that a validation has just begun.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    for counters in (batches["total"], batches["current"]):
        counters["completed"] = counters["processed"]
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    validated = validation["total"]["completed"]
    begun = {"ready": validated + 1, "started": validated + 1}
    validation["total"].update(begun, processed=validated, completed=validated)
    validation["current"].update(dict.fromkeys(validation["current"], 0))
    validation["is_last_batch"] = False
    if batches["is_last_batch"]:
        fit_loop["state_dict"].pop("combined_loader", None)  # at its end; the next is a new one
