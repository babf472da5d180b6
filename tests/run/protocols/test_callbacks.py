"""Questions of callbacks: of the first that answers, or of all."""

from typing import Any

import lightning.pytorch as pl

from lightning_align.run.protocols import batch_cutter, forget_window


class Cuts(pl.Callback):
    """Makes a list of each batch."""

    def __init__(self) -> None:
        self.forgotten = 0

    def cut_batch(self, batch: Any, number: int) -> Any:
        return [batch, number]

    def forget_window(self) -> None:
        self.forgotten += 1


def trainer_with(*callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[*callbacks]
    )


def test_batches_are_cut_by_a_callback_that_does_so() -> None:
    assert batch_cutter(trainer_with(pl.Callback())) is None
    cut = batch_cutter(trainer_with(pl.Callback(), Cuts()))
    assert cut is not None
    assert cut("batch", 7) == ["batch", 7]


def test_whoever_counts_forgets_a_window_and_nobody_else_is_asked() -> None:
    first, second = Cuts(), Cuts()
    forget_window([pl.LightningModule(), first, pl.Callback(), second])
    assert (first.forgotten, second.forgotten) == (1, 1)
