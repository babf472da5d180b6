"""A monitored value that is not there: waited for, warned of, refused; and NaN."""

import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_align import AsyncCheckpoint
from lightning_align.callbacks.checkpoint_monitor import score_of
from tests.callbacks.test_async_checkpoint import fit, names, trainer
from tests.helpers.foreign import Stranger
from tests.helpers.ranks import ForkedRanks, run_ranks


@pytest.mark.parametrize(
    "options",
    [
        {"check_val_every_n_epoch": 2, "max_epochs": 4},
        {"max_steps": 4, "max_epochs": -1},
        {"limit_val_batches": 0},
    ],
    ids=["every second epoch", "ends before the first", "no validation"],
)
@pytest.mark.parametrize(
    "triggers", [{"every_n_train_steps": 2}, {"save_on_train_epoch_end": True}]
)
def test_a_value_that_no_validation_has_produced_yet_is_warned_of_and_waited_for(
    tmp_path: Path, options: dict[str, Any], triggers: dict[str, Any]
) -> None:
    callback = AsyncCheckpoint(
        tmp_path, monitor="val_loss", save_top_k=-1, filename="{step}", **triggers
    )
    told = r"Nothing is saved at step \d+\. AsyncCheckpoint\(monitor='val_loss'\): was not logged"
    with pytest.warns(UserWarning, match=told):
        fit(callback, folder=tmp_path, **options)
    by_epoch = {"step=12", "step=18", "step=24"}
    by_step = {f"step={step}" for step in range(12, 25, 2)}
    waited = by_epoch if "save_on_train_epoch_end" in triggers else by_step
    assert names(tmp_path) == (waited if "check_val_every_n_epoch" in options else set())


def test_a_value_that_a_validation_leaves_out_is_refused(tmp_path: Path) -> None:
    for number, triggers in enumerate(({"every_n_train_steps": 2}, {"every_n_epochs": 1})):
        callback = AsyncCheckpoint(tmp_path / str(number), monitor="nothing", **triggers)
        with pytest.raises(ValueError, match=r"monitor='nothing'\): was not logged; these values"):
            fit(callback, folder=tmp_path)


def test_a_save_that_waits_is_named_after_the_step_that_is_saved(tmp_path: Path) -> None:
    """Due at step 2, saved after the validation behind step 3: every number is that of step 3."""
    losses: list[float] = []

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            losses.append(float(trainer.callback_metrics["loss"]))

    callback = AsyncCheckpoint(
        tmp_path, "{step}-{loss:.6f}", "val_loss", every_n_train_steps=2, save_top_k=-1
    )
    fit(Note(), callback, folder=tmp_path, max_steps=3, max_epochs=-1, val_check_interval=3)
    assert names(tmp_path) == {f"step=3-loss={losses[2]:.6f}"}


def test_a_value_that_only_rank_zero_logs_ranks(tmp_path: Path) -> None:
    """Saving is collective: a rank that went by its own metrics would leave the others waiting."""

    class OnRankZero(pl.Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.is_global_zero:
                pl_module.log("score", float(trainer.current_epoch), rank_zero_only=True)

    def train(rank: int) -> str:
        callback = AsyncCheckpoint(tmp_path, "{epoch}", "score", mode="max")
        plugins = [ForkedRanks(rank, 2)]
        fit(OnRankZero(), callback, folder=tmp_path, strategy="ddp", devices=2, plugins=plugins)
        return Path(callback.best_model_path).stem

    assert run_ranks(train) == ["epoch=1", "epoch=1"]


def test_save_last_saves_at_the_end_what_no_trigger_has_saved(tmp_path: Path) -> None:
    callback = AsyncCheckpoint(
        tmp_path, "{step}", "val_loss", every_n_train_steps=100, save_last=True
    )
    fit(callback, folder=tmp_path, max_epochs=1)
    assert names(tmp_path) == {"step=6"}
    assert callback.best_model_path == ""
    assert Path(callback.last_model_path).stem == "step=6"
    made = fit(
        AsyncCheckpoint(tmp_path, "{step}", "val_loss", every_n_train_steps=100),
        folder=tmp_path,
        ckpt_path="last",
    )
    assert made.global_step == 12


class RaiseAfter(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise ArithmeticError


@pytest.mark.parametrize("step", [3, 9], ids=["not logged yet", "not among the best"])
def test_an_exception_saves_whatever_the_monitor_says(tmp_path: Path, step: int) -> None:
    class Rising(Stranger):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", float(self.global_step))

    def made(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pl.seed_everything(5, verbose=False)
            ours = trainer(*callbacks, folder=tmp_path, max_epochs=3)
            ours.fit(Rising(), **options)
        return ours

    options = {"monitor": "val_loss", "save_on_exception": True, "filename": "{step}"}
    callback = AsyncCheckpoint(tmp_path / "a", **options)
    with pytest.raises(ArithmeticError):
        made(callback, RaiseAfter(step))
    best = {"step=6"} if step > 6 else set()
    assert names(tmp_path / "a") == {*best, f"step={step}"}
    assert {Path(path).stem for path in callback.best_k_models} == best
    resumed = made(AsyncCheckpoint(tmp_path / "a", **options), ckpt_path="last").lightning_module
    whole = made(AsyncCheckpoint(tmp_path / "whole")).lightning_module
    assert names(tmp_path / "a") == {"step=6", f"step={step}"}
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


@pytest.mark.parametrize(("mode", "worst"), [("min", math.inf), ("max", -math.inf)])
def test_nan_is_the_worst_score(mode: str, worst: float) -> None:
    metrics = {"nan": torch.tensor(math.nan), "loss": torch.tensor(0.5)}
    assert score_of(metrics, "nan", mode) == worst
    assert score_of(metrics, "loss", mode) == 0.5
    assert score_of(metrics, "of rank zero only", mode) == worst
