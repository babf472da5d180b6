from typing import Any

import lightning.pytorch as pl

from lightning_align.run.position import batches_consumed
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
