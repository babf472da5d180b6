"""What hooks of an epoch's beginning set goes on in mid-epoch, and windows are never mixed."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from torch import nn

from lightning_align.run.exact_resume import ExactResume
from tests.helpers.covers import cover
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.resumable import (
    Fit,
    Plain,
    WithValidation,
    async_checkpoint,
    every_batch,
    later,
    model_checkpoint,
    resumes,
)


def accumulate_more() -> list[pl.Callback]:
    return [GradientAccumulationScheduler({0: 1, 1: 2})]


@pytest.mark.parametrize("savers", [model_checkpoint, async_checkpoint, every_batch])
def test_accumulation_that_a_callback_has_scheduled_goes_on(tmp_path: Path, savers: Any) -> None:
    resumes(Fit(tmp_path, Plain, savers, accumulate_more), 8, 10)


def test_an_open_window_of_a_schedule_goes_on(tmp_path: Path) -> None:
    resumes(Fit(tmp_path, Plain, every_batch, accumulate_more), 9)


def test_scheduled_accumulation_goes_on_on_two_ranks(tmp_path: Path) -> None:
    def on(rank: int) -> None:
        trainer = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        resumes(Fit(tmp_path, Plain, every_batch, accumulate_more, trainer), 5)

    run_ranks(on)


class Freezes(WithValidation):
    """Freezes and releases by epoch, clips by epoch, and lets BatchNorm rest."""

    def __init__(self) -> None:
        super().__init__()
        self.body.insert(1, nn.BatchNorm1d(8))

    def on_train_epoch_start(self) -> None:
        self.body[0].requires_grad_(self.current_epoch != 1)
        self.body[1].train(self.current_epoch != 1)
        self.trainer.gradient_clip_val = 0.1 * (1 + self.current_epoch)


@pytest.mark.parametrize("savers", [model_checkpoint, async_checkpoint])
def test_frozen_parameters_modes_and_clipping_of_an_epoch_go_on(
    tmp_path: Path, savers: Any
) -> None:
    resumes(Fit(tmp_path, Freezes, savers), 8)


class Unfreezes(BaseFinetuning):
    """Its own finetuning: the first layer and its BatchNorm learn from epoch 1 on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.body[0], pl_module.body[1]], train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group([pl_module.body[0], pl_module.body[1]], optimizer)


class WithBackbone(WithValidation):
    def __init__(self) -> None:
        super().__init__()
        self.body.insert(1, nn.BatchNorm1d(8))

    @property
    def backbone(self) -> nn.Module:
        return self.body[0]

    def configure_optimizers(self) -> Any:
        learning = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learning, lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


FINETUNING = {
    "own": lambda: [Unfreezes()],
    "backbone": lambda: [
        BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)
    ],
}


@cover(name=list(FINETUNING), savers=[model_checkpoint, async_checkpoint])
def test_finetuning_goes_on(tmp_path: Path, savers: Any, name: str) -> None:
    resumes(Fit(tmp_path, WithBackbone, savers, FINETUNING[name]), 4, 9, 15)


def test_what_ddp_does_not_average_is_named(tmp_path: Path) -> None:
    def on(rank: int) -> list[str]:
        strategy = "ddp_find_unused_parameters_true"
        trainer = {"devices": 2, "strategy": strategy, "plugins": [ForkedRanks(rank, 2)]}
        with warnings.catch_warnings(record=True) as caught:
            Fit(tmp_path, WithBackbone, callbacks=FINETUNING["own"], trainer=trainer).run()
            Fit(tmp_path, Freezes, trainer=trainer).run("frozen by epoch")
        return [str(w.message) for w in caught if "frozen when DDP" in str(w.message)]

    of_rank_zero, of_rank_one = run_ranks(on)
    assert len(of_rank_zero) == 1
    assert "['body.0.weight', 'body.0.bias', 'body.1.weight'" in of_rank_zero[0]
    assert not of_rank_one


def test_averaged_weights_go_on(tmp_path: Path) -> None:
    callbacks = lambda: [EMAWeightAveraging(decay=0.9)]  # noqa: E731
    resumes(Fit(tmp_path, WithValidation, model_checkpoint, callbacks), 9)


# Another accumulation than that of the checkpoint


def with_window(tmp_path: Path, position: int) -> tuple[Fit, Path]:
    fit = Fit(tmp_path, Plain, every_batch, trainer={"accumulate_grad_batches": 3})
    fit.run()
    return fit, fit.checkpoint(position)


@pytest.mark.parametrize(
    ("position", "now"), [(1, 1), (2, 2), (3, 2), (9, 2)], ids=["first", "open", "step", "epoch 1"]
)
def test_a_window_is_not_continued_with_other_weights(
    tmp_path: Path, position: int, now: int
) -> None:
    fit, path = with_window(tmp_path, position)
    with pytest.raises(
        ValueError, match=rf"accumulate_grad_batches={now}\): the checkpoint lies after"
    ):
        fit.run("other", ckpt_path=path, accumulate_grad_batches=now)
    assert not Path(tmp_path, "other.0").exists(), "before the first step"


@pytest.mark.parametrize(("position", "now"), [(3, 1), (6, 2), (6, 4)])
def test_another_accumulation_begins_where_a_window_ends(
    tmp_path: Path, position: int, now: int
) -> None:
    """As a run that took that many batches a step from there on."""
    fit, path = with_window(tmp_path, position)

    class Changes(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx >= position:
                trainer.accumulate_grad_batches = now

    expected = fit.run("changes", extra=[Changes()])
    resumed = fit.run("other", ckpt_path=path, accumulate_grad_batches=now)
    assert later(resumed, position) == later(expected, position)


class StartsFrozen(Plain):
    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.body[0].requires_grad_(not frozen)


def test_other_frozen_parameters_are_the_users_but_not_in_a_window(tmp_path: Path) -> None:
    trainer = {"accumulate_grad_batches": 3}
    fit = Fit(tmp_path, partial(StartsFrozen, False), every_batch, trainer=trainer)
    fit.run()
    other = partial(StartsFrozen, True)
    with pytest.raises(
        ValueError, match=r"requires_grad=False\): the checkpoint was written in mid"
    ):
        fit.run("open", ckpt_path=fit.checkpoint(2), module=other)
    built: list[Plain] = []

    def module() -> Plain:
        built.append(other())
        return built[0]

    fit.run("closed", ckpt_path=fit.checkpoint(3), module=module)
    assert not built[0].body[0].weight.requires_grad


# Stochastic weight averaging


def averaging() -> list[pl.Callback]:
    return [StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=2)]


@pytest.mark.parametrize("savers", [model_checkpoint, async_checkpoint])
def test_stochastic_weight_averaging_goes_on(tmp_path: Path, savers: Any) -> None:
    """Before it begins, in its epochs and between them."""
    trainer = {"max_epochs": 4, "limit_val_batches": 0}
    fit = Fit(tmp_path, WithBackbone, savers, averaging, trainer)
    resumes(fit, 4, 8, 12, 15, 23)


@pytest.mark.parametrize("position", [18, 20], ids=["begin", "middle"])
def test_the_epoch_of_batchnorm_is_not_resumed(tmp_path: Path, position: int) -> None:
    fit = Fit(tmp_path, WithBackbone, every_batch, averaging)
    fit.run()
    with pytest.raises(
        ValueError, match=r"StochasticWeightAveraging\(ckpt_path=.*epochs of training are over"
    ):
        fit.run("resumed", ckpt_path=fit.checkpoint(position))


class Scheduled(Plain):
    def __init__(self, schedule: Any, interval: str = "step") -> None:
        super().__init__()
        self.schedule = schedule
        self.interval = interval

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = {"scheduler": self.schedule(optimizer), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def scheduled(folder: Path, schedule: Any, steps: int, ckpt_path: Path | None = None) -> None:
    options = {"enable_checkpointing": False, "logger": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_steps=steps, callbacks=[ExactResume()], default_root_dir=folder, **options
    )
    trainer.fit(Scheduled(schedule), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")


cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=6)
one_cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=4)


def test_a_schedule_that_is_built_otherwise_is_said_to_go_on_as_it_was(tmp_path: Path) -> None:
    scheduled(tmp_path, cosine, 2)
    with pytest.warns(UserWarning, match="CosineAnnealingLR: goes on .* T_max=6, not 9") as told:
        scheduled(tmp_path, partial(cosine, T_max=9), 4, tmp_path / "2.ckpt")
    assert sum("goes on as in the checkpoint" in str(each.message) for each in told) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*goes on as in the checkpoint")
        scheduled(tmp_path, cosine, 4, tmp_path / "2.ckpt")
    # What goes on is what a second resume is held against, and not what the first was built with.
    with pytest.warns(UserWarning, match="T_max=6, not 9"):
        scheduled(tmp_path, partial(cosine, T_max=9), 4, tmp_path / "2.ckpt")
    with pytest.warns(UserWarning, match="T_max=6, not 9"):
        scheduled(tmp_path, partial(cosine, T_max=9), 6, tmp_path / "4.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*goes on as in the checkpoint")
        scheduled(tmp_path, cosine, 6, tmp_path / "4.ckpt")


def test_a_run_longer_than_its_cycle_is_refused_before_it_trains(tmp_path: Path) -> None:
    scheduled(tmp_path, one_cycle, 4)
    with pytest.raises(ValueError, match=r"OneCycleLR\(total_steps=4\): the run takes 5 .*Give 5"):
        scheduled(tmp_path, one_cycle, 5)
    with pytest.raises(ValueError, match=r"checkpoint\. End the run there"):
        scheduled(tmp_path, partial(one_cycle, total_steps=9), 9, tmp_path / "4.ckpt")


def fit_for(folder: Path, interval: str, *callbacks: Any, **options: Any) -> None:
    quiet = {"enable_checkpointing": False, "logger": False, "enable_progress_bar": False}
    own: Any = {"callbacks": [ExactResume(), *callbacks], "default_root_dir": folder}
    pl.Trainer(**own, **quiet, **options).fit(Scheduled(one_cycle, interval))


def test_a_cycle_of_epochs_is_held_against_epochs(tmp_path: Path) -> None:
    fit_for(tmp_path, "epoch", max_epochs=4)
    with pytest.raises(ValueError, match=r"the run takes 5 epochs, .* with max_epochs"):
        fit_for(tmp_path, "epoch", max_epochs=5)


def test_a_run_of_which_nobody_knows_how_many_steps_it_takes_is_not_refused(tmp_path: Path) -> None:
    """Batches of a step by a schedule, of which Lightning has one when it counts the steps."""
    many = GradientAccumulationScheduler({0: 1000})
    fit_for(tmp_path, "step", many, max_epochs=4)  # a step for each epoch's last batch
    with pytest.raises(ValueError, match="the run takes"):
        fit_for(tmp_path, "step", max_epochs=4)


def test_weights_in_double_precision_are_not_rounded_on_their_way(tmp_path: Path) -> None:
    double = {"precision": "64-true"}
    resumes(Fit(tmp_path, Plain, every_batch, list, double), 3)
