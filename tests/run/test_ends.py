"""A checkpoint of a batch that a validation or an epoch's end follows is resumed with them."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torchmetrics import MeanMetric

from lightning_align import AsyncCheckpoint, ExactResume
from lightning_align.run.position import batches_consumed
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.resumable import (
    Fit,
    WithValidation,
    after_validation,
    every_batch,
    later,
    model_checkpoint,
)


class Ends(WithValidation):
    """Everything at an epoch's end decides how it trains."""

    def __init__(self, interval: str = "epoch") -> None:
        super().__init__()
        self.interval, self.losses, self.factor = interval, [], 1.0
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(float(loss))
        self.mean.update(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss * self.factor

    def on_train_epoch_end(self) -> None:
        self.factor = 1 + sum(self.losses) / len(self.losses)
        self.losses.clear()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        reduce = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        monitored = {"scheduler": reduce, "monitor": "val_loss", "strict": False}
        config = {**monitored, "interval": self.interval, "frequency": 1}
        return {"optimizer": optimizer, "lr_scheduler": config}


def resumes_with_the_end(fit: Fit, *positions: int) -> None:
    """The law, with what was written at the position itself behind the save."""
    whole = fit.run()
    for position in positions:
        resumed = fit.run(f"from-{position}", ckpt_path=fit.checkpoint(position))
        at_once = [
            line
            for line in whole
            if line.startswith((f"{position} validation", f"{position} epoch"))
        ]
        if fit.savers is after_validation:
            at_once = [line for line in at_once if "validation" not in line]
        assert at_once
        assert resumed == [*at_once, *later(whole, position)], f"from {position}"


SETTINGS: dict[str, dict[str, Any]] = {
    "epochs": {},
    "steps": {"max_steps": 17, "max_epochs": -1},
    "no validation": {"limit_val_batches": 0},
    "accumulate": {"accumulate_grad_batches": 4},
    "seldom": {"check_val_every_n_epoch": 2},
    "short": {"limit_train_batches": 5},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "savers", [model_checkpoint, pytest.param(every_batch, marks=pytest.mark.slow)]
)
def test_the_end_of_an_epoch_runs_once(tmp_path: Path, savers: Any, name: str) -> None:
    last = 5 if name == "short" else 6
    fit = Fit(tmp_path, Ends, savers, trainer=SETTINGS[name])
    resumes_with_the_end(fit, last, 2 * last)


def test_the_last_epoch_ends(tmp_path: Path) -> None:
    fit = Fit(tmp_path, Ends, callbacks=lambda: [EarlyStopping("val_loss", patience=9)])
    resumes_with_the_end(fit, 18)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_validation_in_mid_epoch_runs_once(tmp_path: Path, interval: str) -> None:
    fit = Fit(tmp_path, lambda: Ends(interval), trainer={"val_check_interval": 2})
    resumes_with_the_end(fit, 2, 8, 12)


def test_an_epochs_end_behind_its_validation_runs_once(tmp_path: Path) -> None:
    resumes_with_the_end(Fit(tmp_path, Ends, after_validation), 6, 12)


class EndsAlike(Ends):
    """Ends an epoch as often as Lightning says, and nothing comes of it."""

    on_train_epoch_end = pl.LightningModule.on_train_epoch_end


def at_the_end(folder: Path) -> list[pl.Callback]:
    return [AsyncCheckpoint(folder, "{step}", save_top_k=-1, save_on_train_epoch_end=True)]


@pytest.mark.parametrize("module", [Ends, EndsAlike])
def test_an_epoch_that_max_steps_has_ended_ends_again_and_says_so(
    tmp_path: Path, module: Any
) -> None:
    steps = {"max_epochs": -1, "max_steps": 4}
    fit = Fit(tmp_path, module, at_the_end, trainer=steps)
    fit.run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.run("longer", ckpt_path=fit.checkpoint(4), max_steps=9)
    named = [str(w.message) for w in caught if "ended epoch 0 after 4" in str(w.message)]
    assert len(named) == 1
    whose = ["Ends", "WriteDown"] if module is Ends else ["WriteDown"]
    assert f"on_train_epoch_end of {whose} was called" in named[0]


class SaveBefore(pl.Callback):
    """Saves before a validation, as what Ctrl-C stops there does."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/{batches_consumed(trainer)}.ckpt")


def test_a_validation_that_has_not_begun_is_run(tmp_path: Path) -> None:
    def savers(folder: Path) -> list[pl.Callback]:
        return [ExactResume(), SaveBefore()]

    resumes_with_the_end(Fit(tmp_path, Ends, savers, trainer={"val_check_interval": 3}), 3, 6)


def test_on_two_ranks(tmp_path: Path) -> None:
    def on(rank: int) -> None:
        trainer = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        resumes_with_the_end(Fit(tmp_path, Ends, trainer=trainer), 3, 6)

    run_ranks(on)
