from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_align.run.position import (
    Place,
    batches_consumed,
    begin_interrupted_epoch_anew,
    close_epoch,
    epoch_is_open,
    leave_validation_to_do,
    next_place,
)
from tests.helpers.resume import HandWritten, SequenceData


class Positions(pl.Callback):
    """Notes the position at the beginning and the end of every batch, and in validation."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = {"start": [], "end": [], "validation": []}

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seen["start"].append(batches_consumed(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seen["end"].append(batches_consumed(trainer))

    def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seen["validation"].append(batches_consumed(trainer))


def test_an_interrupted_epoch_is_not_counted_as_one_that_is_open() -> None:
    trainer = pl.Trainer(logger=False, enable_checkpointing=False)
    counters = trainer.fit_loop.epoch_progress
    for each in (counters.total, counters.current):
        each.ready = each.started = 3
        each.processed = each.completed = 2
    begin_interrupted_epoch_anew(trainer)
    for each in (counters.total, counters.current):
        assert (each.ready, each.started, each.processed, each.completed) == (2, 2, 2, 2)


def test_counts_completed_batches_over_epochs_whatever_validation_does() -> None:
    """Two epochs of ten batches at accumulate 3, validated twice an epoch after a sanity check."""
    positions = Positions()
    trainer = pl.Trainer(
        max_epochs=2,
        accumulate_grad_batches=3,
        val_check_interval=0.5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[positions],
    )
    trainer.fit(HandWritten(), SequenceData())
    assert positions.seen["start"] == list(range(20))
    assert positions.seen["end"] == list(range(1, 21))
    assert positions.seen["validation"] == [0, 5, 10, 15, 20]


def counters(epoch: tuple[int, int], batches: int, last: bool) -> dict[str, Any]:
    """Lightning's counters after ``batches`` of an epoch; ``epoch``: started and processed."""
    started, processed = epoch
    current = {"ready": started, "started": started, "processed": processed, "completed": 0}
    batch = dict.fromkeys(("ready", "started", "processed"), batches) | {"completed": batches - 1}
    return {
        "state_dict": {"combined_loader": []},
        "epoch_loop.val_loop.batch_progress": {
            "total": dict.fromkeys(("ready", "started", "processed", "completed"), 4),
            "current": dict.fromkeys(("ready", "started", "processed", "completed"), 2),
            "is_last_batch": True,
        },
        "epoch_progress": {"total": dict(current), "current": current},
        "epoch_loop.state_dict": {"_batches_that_stepped": batches - 1},
        "epoch_loop.batch_progress": {
            "total": dict(batch),
            "current": batch,
            "is_last_batch": last,
        },
    }


@pytest.mark.parametrize(
    ("loop", "place"),
    [
        (counters((0, 0), 0, last=False), Place(0, 0)),
        (counters((1, 0), 3, last=False), Place(0, 3)),
        (counters((1, 0), 6, last=True), Place(1, 0)),
        (counters((1, 1), 6, last=True), Place(1, 0)),
        (counters((3, 2), 4, last=False), Place(2, 4)),
        (counters((3, 3), 4, last=False), Place(2, 4)),
    ],
    ids=["nothing", "mid-epoch", "last-batch", "epoch-end", "third-epoch", "stopped-by-max-steps"],
)
def test_next_place(loop: dict[str, Any], place: Place) -> None:
    assert next_place(loop) == place


@pytest.mark.parametrize("processed", [0, 1], ids=["last-batch", "epoch-end"])
def test_close_epoch_leaves_nothing_of_the_old_one(processed: int) -> None:
    loop = counters((1, processed), 6, last=True)
    close_epoch(loop)
    assert set(loop["epoch_progress"]["current"].values()) == {1}
    assert set(loop["epoch_loop.batch_progress"]["current"].values()) == {0}
    assert set(loop["epoch_loop.batch_progress"]["total"].values()) == {6}
    assert loop["epoch_loop.state_dict"]["_batches_that_stepped"] == 6 - processed
    assert loop["state_dict"] == {}
    assert next_place(loop) == Place(1, 0)


def test_an_epoch_is_open_until_its_hooks_have_run() -> None:
    assert epoch_is_open(counters((1, 0), 6, last=True))
    assert not epoch_is_open(counters((1, 1), 6, last=True))


def test_a_validation_that_is_to_do_has_begun_and_its_batch_is_over() -> None:
    loop = counters((1, 0), 6, last=True)
    leave_validation_to_do(loop)
    batches, validation = (loop[f"epoch_loop.{name}batch_progress"] for name in ("", "val_loop."))
    assert batches["current"]["completed"] == batches["total"]["completed"] == 6
    begun = {"ready": 5, "started": 5, "processed": 4, "completed": 4}
    assert validation["total"] == begun
    assert set(validation["current"].values()) == {0}
    assert not validation["is_last_batch"]
    assert loop["state_dict"] == {}
