"""What test_loader.py cannot show: resumes by other numbers of ranks, and closed epochs."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_align.run.epoch_means import capture_means, restore_means
from tests.helpers.foreign import Stranger


class Capture(pl.Callback):
    def __init__(self) -> None:
        self.means: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.means = capture_means(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.closed = capture_means(trainer, pl_module)[0]


def run(capture: pl.Callback, **options: Any) -> tuple[pl.Trainer, Stranger]:
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[capture],
        **options,
    )
    module = Stranger()
    trainer.fit(module)
    return trainer, module


def test_means_of_a_closed_epoch_are_final_and_only_their_values_are_kept() -> None:
    capture = Capture()
    trainer, _ = run(capture)
    assert capture.closed["sums"] == {}
    assert capture.closed["metrics"] == {}, "Lightning resets the metric that was logged"
    assert capture.closed["latest"]["loss_epoch"] == trainer.callback_metrics["loss_epoch"]


def test_a_metric_that_is_not_logged_is_the_modules_own_and_kept() -> None:
    class Own(Capture):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.mean_loss_of_run = getattr(pl_module, "mean_loss_of_run", OTHER)
            pl_module.mean_loss_of_run.update(1.0)

    from torchmetrics import MeanMetric

    OTHER = MeanMetric()
    capture = Own()
    run(capture)
    assert list(capture.closed["metrics"]) == ["mean_loss_of_run"]
    assert capture.closed["metrics"]["mean_loss_of_run"]["updates"] == 6


def test_another_number_of_ranks_keeps_what_monitors_see_and_says_what_starts_anew() -> None:
    class MidEpoch(Capture):
        def on_train_epoch_end(self, *args: Any) -> None:
            pass

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                self.means = capture_means(trainer, pl_module)

    capture = MidEpoch()
    trainer, module = run(capture)
    means = [{**capture.means[0], "latest": {"val_loss": torch.tensor(0.5)}}] * 2
    before = module.mean_loss.metric_state["mean_value"].clone()
    with pytest.warns(UserWarning, match=r"written by 2 rank\(s\) and is resumed by 1: means of"):
        restore_means(trainer, module, means)
    assert trainer.callback_metrics["val_loss"] == 0.5
    assert torch.equal(module.mean_loss.metric_state["mean_value"], before)
    restore_means(trainer, module, means[:1])
    assert not torch.equal(module.mean_loss.metric_state["mean_value"], before)


def test_a_checkpoint_of_lightning_alone_has_none() -> None:
    trainer, module = run(Capture())
    restore_means(trainer, module, [])
