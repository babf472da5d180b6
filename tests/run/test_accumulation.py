from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_align.run.accumulation import (
    capture_accumulation,
    is_safe_point,
    restore_accumulation,
)
from tests.helpers.resume import HandWritten, SequenceData


class Notes(pl.Callback):
    """Whether each hook at which one might save is a safe point."""

    def __init__(self) -> None:
        self.safe: list[tuple[str, bool]] = []
        self.windows: list[Any] = []
        self.gradients: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.safe.append(("batch", is_safe_point(trainer)))
        self.windows.append(capture_accumulation(trainer, pl_module))
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters()})

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.safe.append(("validation", is_safe_point(trainer)))

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.safe.append(("epoch", is_safe_point(trainer)))


def noted(**options: Any) -> tuple[Notes, pl.Trainer, HandWritten]:
    notes, module = Notes(), HandWritten()
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=4,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[notes],
        **options,
    )
    trainer.fit(module, SequenceData())
    return notes, trainer, module


def test_last_batch_is_safe_only_once_the_epoch_is_closed() -> None:
    notes, _, _ = noted()
    batches = [("batch", True)] * 3 + [("batch", False)]
    assert notes.safe == [*batches, ("validation", False), ("epoch", True)]


def test_a_batch_that_a_validation_follows_is_safe_once_it_has_run() -> None:
    notes, _, _ = noted(val_check_interval=2)
    middle = [("batch", True), ("batch", False), ("validation", True)]
    end = [("batch", True), ("batch", False), ("validation", False), ("epoch", True)]
    assert notes.safe == middle + end


def test_window_is_captured_only_while_gradients_wait_and_restores_them() -> None:
    notes, trainer, module = noted(accumulate_grad_batches=3)
    assert [bool(window) for window in notes.windows] == [True, True, False, False]
    module.zero_grad()
    restore_accumulation(trainer, module, notes.windows[1])
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, notes.gradients[1][name])


def test_captured_gradients_do_not_change_when_training_goes_on() -> None:
    """Later batches add into the same gradient tensors; a view of them would change with the
    run."""
    notes, _, _ = noted(accumulate_grad_batches=3)
    (window,) = notes.windows[0]
    for name, gradient in window["gradients"].items():
        assert torch.equal(gradient, notes.gradients[0][name])


def test_sums_of_a_module_travel_with_the_gradients() -> None:
    notes, trainer, module = noted(accumulate_grad_batches=3)
    window = [{**notes.windows[0][0], "sums": {"loss": torch.tensor([1.0, 2.0])}}]
    module.accumulated = {}
    restore_accumulation(trainer, module, window)
    assert module.accumulated["loss"].tolist() == [1.0, 2.0]


def test_another_number_of_ranks_is_refused_in_mid_accumulation() -> None:
    notes, trainer, module = noted(accumulate_grad_batches=3)
    with pytest.raises(ValueError, match=r"world_size=1\): the checkpoint was written in mid-acc"):
        restore_accumulation(trainer, module, notes.windows[0] * 2)
