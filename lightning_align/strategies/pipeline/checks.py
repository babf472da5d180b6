"""What a pipeline refuses, before it trains anything."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed
from torch.optim import Optimizer

from lightning_align._compat import lightning_processes
from lightning_align._errors import argument_error
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.protocols import RefusesPipeline, misspelt
from lightning_align.strategies.pipeline import microbatches
from lightning_align.strategies.pipeline.chain import WHERE
from lightning_align.strategies.pipeline.runtime import SCHEDULES

_CHECKED_BATCHES = 3  # of each loop, that all ranks have the same
_OF_WHOLE_MODELS = (
    callbacks.StochasticWeightAveraging,
    callbacks.WeightAveraging,
    callbacks.BaseFinetuning,
)


def check_arguments(
    schedule: str,
    num_microbatches: int | None,
    num_stages_per_rank: int | None,
) -> bool:
    """Check arguments; returns whether the schedule is for several stages on each rank.

    Raises:
        ValueError: If one is out of its range.
    """
    if schedule not in SCHEDULES:
        raise argument_error(WHERE, "schedule", schedule, f"must be one of {list(SCHEDULES)}")
    for name, value in (
        ("num_microbatches", num_microbatches),
        ("num_stages_per_rank", num_stages_per_rank),
    ):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise argument_error(WHERE, name, value, "must be an integer of at least 1")
    several = SCHEDULES[schedule]
    if not several and num_stages_per_rank not in (None, 1):
        rule = f"{schedule} has one stage on each rank"
        way_out = "Use schedule='Interleaved1F1B'"
        raise argument_error(WHERE, "num_stages_per_rank", num_stages_per_rank, rule, way_out)
    if several and num_stages_per_rank == 1:
        rule = f"{schedule} needs at least 2 stages on each rank"
        raise argument_error(WHERE, "num_stages_per_rank", 1, rule, "Use schedule='1F1B'")
    return several


def check_size(size: int | str, world_size: int) -> None:
    """Refuse a ``pipeline_parallel_size`` that leaves ranks over.

    Raises:
        ValueError: If it is not the number of all ranks.
    """
    if size not in ("auto", world_size):
        rule = f"with one data-parallel replica it must be the world size, {world_size}"
        way_out = "Leave it at 'auto', or set devices to it"
        raise argument_error(WHERE, "pipeline_parallel_size", size, rule, way_out)


def check_module(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse what a pipeline cannot train.

    Raises:
        ValueError: If the module or a callback of the trainer cannot work with it.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        rule = "it optimizes manually, and a pipeline propagates back by its schedule"
        raise argument_error(WHERE, "model", name, rule, "Use automatic optimization")
    if type(module).backward is not pl.LightningModule.backward or "backward" in vars(module):
        rule = "it overrides backward, and a pipeline propagates back by its schedule"
        way_out = "Change gradients in on_after_backward, or the loss in training_step"
        raise argument_error(WHERE, "model", name, rule, way_out)
    for name_here, meant in misspelt(module).items():
        rank_zero_warn(f"{WHERE}: {name}.{name_here} is not asked for. Is it meant as {meant}?")
    if isinstance(module, RefusesPipeline) and module.pipeline_refusal:
        raise argument_error(WHERE, "model", name, module.pipeline_refusal, "Use another strategy")
    for callback in callbacks_of(trainer):
        name = type(callback).__name__
        if isinstance(callback, _OF_WHOLE_MODELS):
            rule = "it needs the whole model, and a rank holds a part of it"
            way_out = "Leave the callback out, or use another strategy"
            raise argument_error(WHERE, "callbacks", name, rule, way_out)
        if trainer.world_size > 1 and _saves_on_exception(callback):
            rule = "it saves when a rank fails, and a checkpoint takes all ranks: they would wait"
            way_out = "Save every few steps, or at SIGTERM: AsyncCheckpoint(save_on_exception=True)"
            raise argument_error(WHERE, "callbacks", name, rule, way_out)


def _saves_on_exception(callback: pl.Callback) -> bool:
    if isinstance(callback, callbacks.ModelCheckpoint):
        inherited = type(callback).on_exception is callbacks.ModelCheckpoint.on_exception
        return inherited and bool(callback.save_on_exception)
    return isinstance(callback, callbacks.OnExceptionCheckpoint)


def check_optimizers(optimizers: list[Optimizer]) -> None:
    """Refuse an optimizer that a pipeline cannot step.

    Raises:
        ValueError: If it calls its closure more than once.
    """
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        rule = "it evaluates the loss several times in a step, and a pipeline once"
        raise argument_error(WHERE, "optimizers", "LBFGS", rule, "Use another optimizer")


def check_settings(
    optimizer: Optimizer, group: distributed.ProcessGroup, device: torch.device
) -> Callable[[], None]:
    """Begin to compare the settings that stages would step with; collective, before each step.

    A scheduler that follows what one rank alone knows would train the stages at different rates.
    The comparison is under way while the batch runs, and keeps no rank waiting for another.

    Returns:
        What ends it: it raises ``ValueError``, on all ranks, if a learning rate or another number
        of the optimizer's groups differs.
    """
    named = [
        (f"{key!r} of group {number}", float(value))
        for number, settings in enumerate(optimizer.param_groups)
        for key, value in sorted(settings.items())
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    ]
    values = torch.tensor([value for _, value in named], dtype=torch.float64, device=device)
    values = values.nan_to_num()
    # The largest of -x is minus the smallest: both in one message.
    both = torch.stack([values, -values])
    answer: Any = distributed.all_reduce(both, distributed.ReduceOp.MAX, group, async_op=True)

    def check() -> None:
        answer.wait()
        differing = (both[0] != -both[1]).nonzero().flatten().tolist()
        if differing:
            name, largest, least = named[differing[0]][0], *both[:, differing[0]].tolist()
            differs = f"{name} is {-least:g} to {largest:g}"
            rule = f"stages must train with the same settings, and {differs}"
            way_out = "Let schedulers follow what self.log or the steps say, which all ranks have"
            raise argument_error(WHERE, "optimizer", type(optimizer).__name__, rule, way_out)

    return check


def check_count(schedule: str, num_stages: int, num_ranks: int, wanted: int | None) -> None:
    """Refuse a number of micro-batches that the schedule cannot run.

    Raises:
        ValueError: If it is too small, or no multiple of the schedule's rounds.
    """
    if wanted is None:
        return
    rounds = max(1, wanted // num_ranks)
    if schedule == "1F1B" and wanted < num_stages:
        rule = f"1F1B needs at least as many micro-batches as stages, {num_stages}"
        raise argument_error(WHERE, "num_microbatches", wanted, rule, "Use schedule='GPipe'")
    if schedule == "Interleaved1F1B" and wanted % rounds:
        rule = f"Interleaved1F1B needs a multiple of {rounds} micro-batches"
        way_out = f"Use {wanted - wanted % num_ranks}"
        raise argument_error(WHERE, "num_microbatches", wanted, rule, way_out)


class FirstBatches:
    """The first batches of each loop: the same on all ranks, and to be cut as asked for.

    Args:
        trainer: The trainer.
        group: The ranks of the pipeline.
        device: Where this rank computes.
        num_microbatches: What the user asked for.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        group: distributed.ProcessGroup,
        device: torch.device,
        num_microbatches: int | None,
    ) -> None:
        self._trainer, self._group, self._device = trainer, group, device
        self._num_microbatches = num_microbatches
        self._checked: dict[str, int] = {}

    def check(self, loop: str, batch: Any) -> None:
        """Check a batch of a loop, if it is one of the first; collective.

        Raises:
            ValueError: If it is another on another rank, or cannot be cut.
        """
        checked = self._checked.get(loop, 0)
        if checked < _CHECKED_BATCHES:
            self._checked[loop] = checked + 1
            check_same(batch, self._group, self._device)
        if loop == "train" and checked == 0:
            check_batch(self._trainer, microbatches.batch_rows(batch), self._num_microbatches)


def check_same(batch: Any, group: distributed.ProcessGroup, device: torch.device) -> None:
    """Check that every rank of the pipeline has the same batch; collective.

    Raises:
        ValueError: If one has another: its inputs would meet labels of other samples.
    """
    ours = microbatches.checksum(batch).to(device)
    theirs = [torch.empty_like(ours) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(theirs, ours, group=group)
    other = [rank for rank, value in enumerate(theirs) if not torch.equal(value, theirs[0])]
    if other:
        rule = f"all ranks must have the same batch, and rank(s) {other} have another than 0"
        way_out = "Call seed_everything, and keep the data loader free of per-rank samplers"
        raise argument_error(WHERE, "batch", "...", rule, way_out)


def check_batch(trainer: pl.Trainer, rows: int, wanted: int | None) -> None:
    """Refuse a number of micro-batches that the loader's batches cannot be cut into.

    A ragged last batch is another matter: it is cut into fewer.

    Raises:
        ValueError: If full batches are no multiple of it.
    """
    loader: Any = trainer.train_dataloader
    sampler = getattr(loader, "sampler", None)
    # Of the loader, if it says: the run may begin with a batch that is smaller.
    declared = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None) or 0
    full = max(rows, declared)
    if wanted is not None and full % wanted:
        rule = f"batches of {full} rows cannot be cut into as many equal parts"
        way_out = f"Use {microbatches.count_that_divides(full, wanted)}, or another batch_size"
        raise argument_error(WHERE, "num_microbatches", wanted, rule, way_out)


def agree_on_overflow(precision: Any, group: distributed.ProcessGroup) -> None:
    """Let all stages skip the optimizer step if the gradients of one have overflown in fp16."""
    scaler = getattr(precision, "scaler", None)
    if scaler is not None:
        add_up = partial(distributed.all_reduce, group=group)
        lightning_processes.share_overflow(scaler, add_up)
