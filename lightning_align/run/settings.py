"""What hooks of an epoch's beginning set: no such hook runs where a run goes on in mid-epoch.

How many batches an optimizer step takes, at which norm gradients are clipped, which parameters are
frozen and which modules are in eval mode: saved as they were when the fit began and as they are.
The latter is put back only where the fit begins today as it did then; where it does not, the user
wants another setting, and has it from the first batch on.

Schedulers of the learning rate are another matter: Lightning takes what they were built with out of
the checkpoint, so whoever builds them otherwise is told, and a schedule too short for the run
is refused.
"""

import inspect
import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR

from lightning_align._compat import lightning_resume
from lightning_align._errors import argument_error
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.protocols.callbacks import CutsBatches

Settings = dict[str, Any]
_PLAIN = (bool, int, float, str)
_OF_TRAINER = ("accumulate_grad_batches", "gradient_clip_val")


def settings_in_force(trainer: pl.Trainer, module: pl.LightningModule) -> Settings:
    """Settings of the trainer and the module as they are now, as plain data."""
    modes = lightning_resume.training_modes(trainer)
    return {
        **{name: getattr(trainer, name) for name in _OF_TRAINER},
        "frozen": [name for name, p in module.named_parameters() if not p.requires_grad],
        "eval": [name for name, training in modes.items() if not training],
        "sync_of_buffers": lightning_resume.sync_of_buffers(trainer),
        "schedules": [_built_with(config.scheduler) for config in trainer.lr_scheduler_configs],
    }


def restore_settings(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    saved: tuple[Settings, Settings],
    start: Settings,
    *,
    window_is_open: bool,
) -> None:
    """Go on with the settings of a checkpoint.

    Args:
        trainer: Of this fit; a setting that it began with another value of is left alone.
        module: Likewise, for what is frozen and what is in evaluation mode.
        saved: Settings of the checkpoint's run as it began, and as it was saved.
        start: Settings with which this fit has begun.
        window_is_open: Whether gradients of the checkpoint wait for their optimizer step.

    Raises:
        ValueError: If a window of accumulation would be of batches that are weighted differently.
    """
    before, then = saved
    for name in _OF_TRAINER:
        if start[name] == before[name]:
            setattr(trainer, name, then[name])
    _check_window(trainer, then["accumulate_grad_batches"], window_is_open)
    _warn_of_schedules(trainer, then.get("schedules", []), start["schedules"])
    changed = set()
    for name, parameter in module.named_parameters():
        if (name in start["frozen"]) == (name in before["frozen"]):
            learns = name not in then["frozen"]
            if parameter.requires_grad != learns:
                parameter.requires_grad_(learns)
        else:
            changed.add(name)
    if changed and window_is_open:
        where, name = type(module).__name__, min(changed)
        began = "frozen" if name in before["frozen"] else "trainable"
        rule = f"the checkpoint was written in mid-accumulation, when {name!r} began {began}"
        way_out = "Freeze what that run froze, or resume from a checkpoint written at an optimizer"
        learns = name not in start["frozen"]
        raise argument_error(where, "requires_grad", learns, rule, f"{way_out} step")
    lightning_resume.sync_of_buffers(trainer, then["sync_of_buffers"])
    for name, part in module.named_modules():
        if (name in start["eval"]) == (name in before["eval"]):
            part.training = name not in then["eval"]


def refuse_short_schedule(trainer: pl.Trainer) -> None:
    """A OneCycleLR raises behind its last step, so it must reach the end of the run.

    Looked at are those that are stepped with the optimizer, or with each epoch, where nothing may
    end the run before or change how many batches are a step.

    Raises:
        ValueError: If it does not.
    """
    may_differ = (EarlyStopping, Timer, GradientAccumulationScheduler)
    callbacks = callbacks_of(trainer)
    if any(isinstance(each, (*may_differ, CutsBatches)) for each in callbacks):
        return
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        if not isinstance(schedule, OneCycleLR) or config.frequency != 1:
            continue
        left = trainer.estimated_stepping_batches - trainer.global_step
        if config.interval == "epoch":
            ends_by_steps = trainer.max_steps != -1 or not trainer.max_epochs
            left = math.inf if ends_by_steps else trainer.max_epochs - trainer.current_epoch  # type: ignore[operator]
        last = schedule.last_epoch + left
        if math.isfinite(last) and last > schedule.total_steps:
            unit = "epochs" if config.interval == "epoch" else "steps"
            rule = f"the run takes {last:.0f} {unit}, more than the schedule has"
            way_out = f"Give {last:.0f}, or end the run there with max_{unit}"
            if trainer.ckpt_path:
                rule += ". It goes on as in the checkpoint"
                way_out = f"End the run there with max_{unit}, or begin a new one from its weights"
            total = schedule.total_steps
            raise argument_error("OneCycleLR", "total_steps", total, rule, way_out)


def _built_with(scheduler: Any) -> Settings:
    """Arguments that a scheduler keeps in its state, and the rates that it began with."""
    names = [*inspect.signature(type(scheduler)).parameters, "base_lrs"]
    state = {name: value for name, value in vars(scheduler).items() if name in names}
    listed = {name: [*v] if isinstance(v, (list, tuple)) else [v] for name, v in state.items()}
    plain = {name: v for name, v in listed.items() if all(type(each) in _PLAIN for each in v)}
    return {name: value for name, value in plain.items() if name != "last_epoch"}


def _warn_of_schedules(trainer: pl.Trainer, before: list[Settings], start: list[Settings]) -> None:
    """Name what the checkpoint's schedulers were built with otherwise than those of this fit."""
    for config, then, now in zip(trainer.lr_scheduler_configs, before, start, strict=False):
        names = [name for name in now if name in then and then[name] != now[name]]
        if names:
            told = [f"{name}={_one(then[name])}, not {_one(now[name])}" for name in names]
            rank_zero_warn(
                f"{type(config.scheduler).__name__}: goes on as in the checkpoint, with"
                f" {', '.join(told)}. For another schedule begin a new run from its weights."
            )


def _one(listed: list[Any]) -> Any:
    return listed[0] if all(each == listed[0] for each in listed) else listed


def _check_window(trainer: pl.Trainer, then: int, window_is_open: bool) -> None:
    """Each batch of a window counts by the number of batches in it, as it was when it came."""
    now = trainer.accumulate_grad_batches
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    batch = 0 if progress.is_last_batch else progress.current.processed
    if now == then or not (window_is_open or batch % now):
        return
    boundary = f"multiple of {now} batches in its epoch and at an optimizer step"
    rule = f"the checkpoint lies after {batch} batches of an epoch in which a step took {then}, so"
    rule += " that the next step would be of batches with other weights"
    way_out = f"Resume with accumulate_grad_batches={then}, or from a checkpoint after a {boundary}"
    raise argument_error("Trainer", "accumulate_grad_batches", now, rule, way_out)


class LeftOut:
    """Parameters that DDP does not average, since they were frozen when it wrapped the module.

    One that is thawed later (``BaseFinetuning``) is trained by each rank for itself, and a
    checkpoint has those of rank zero only. LISA wraps the module anew whenever it thaws a layer.
    """

    def __init__(self) -> None:
        self._wrapped: object = None
        self._parameters: dict[str, nn.Parameter] = {}

    def warn_of_thawed(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Name, once, what ranks train apart. Called when the module is wrapped, and each batch."""
        model = trainer.strategy.model
        if not isinstance(model, DistributedDataParallel):
            return
        if model is not self._wrapped:
            self._wrapped = model
            named = module.named_parameters()
            self._parameters = {name: p for name, p in named if not p.requires_grad}
        thawed = [name for name, p in self._parameters.items() if p.requires_grad]
        if thawed:
            for name in thawed:
                del self._parameters[name]
            rank_zero_warn(
                f"ExactResume: {thawed} of {type(module).__name__} were frozen when DDP wrapped it"
                " and learn now. DDP does not average their gradients: every rank trains weights"
                " of its own, a checkpoint holds those of rank zero, and a resumed run differs."
                " Leave them trainable with a learning rate of zero until then, or begin another"
                " fit in which they are trainable from the start."
            )


def resume_averaging(trainer: pl.Trainer) -> None:
    """Let ``StochasticWeightAveraging`` go on, which begins by such a hook.

    Raises:
        ValueError: If the epoch is the last one, which only takes BatchNorm's statistics.
    """
    module = trainer.lightning_module
    has_statistics = StochasticWeightAveraging.pl_module_contains_batch_norm(module)
    # Behind the last batch of an epoch it is the next one that begins.
    epoch = trainer.current_epoch + trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    for averaging in lightning_resume.averaging_in_checkpoint(trainer):
        last = averaging.swa_end + 1
        if epoch == last and has_statistics:
            # It ends with an optimizer step by the gradients of the last batch before it.
            where = "StochasticWeightAveraging"
            rule = f"all {last} epochs of training are over, and of the one behind them, which"
            rule += " takes BatchNorm's statistics, the beginning is not in a checkpoint"
            way_out = "Resume from a checkpoint of an earlier batch"
            raise argument_error(where, "ckpt_path", str(trainer.ckpt_path), rule, way_out)
        lightning_resume.resume_averaging(trainer, averaging)
