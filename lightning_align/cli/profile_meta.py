"""A step of a run from shapes alone: a model without weights, a batch without tokens.

A batch has the rows that the datamodule would fill at most, and all of their tokens are learned.
What models and losses ask about values is answered as of such a batch: nothing is padding, nothing
is out of the ordinary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_align._compat.torch_autograd import nothing_is_zero_on_meta
from lightning_align._errors import argument_error
from lightning_align.callbacks import LISA, OptimizerSwap
from lightning_align.callbacks.roofline_run import can_fuse, machine_of
from lightning_align.modules import (
    ConversationDataModule,
    DPOModule,
    PreferenceDataModule,
    TextDataModule,
)
from lightning_align.planner.advice import Advice, Setting, advise
from lightning_align.planner.analyze import analyze_step
from lightning_align.planner.machine_at_hand import machine_at_hand
from lightning_align.planner.report import StepReport
from lightning_align.planner.step_time import StepTime
from lightning_align.run.callbacks import callbacks_of

Batch = dict[str, Tensor]


def on_meta(
    trainer: pl.Trainer, module: pl.LightningModule, data: Any, hardware: str | None
) -> tuple[StepTime, dict[str, float], list[Advice]]:
    """A step, nothing measured, and what would help.

    Args:
        trainer: Of the run.
        module: Whose parameters are on meta.
        data: The datamodule, which is not set up.
        hardware: Name of a maker's sheet; None for the processor at hand.

    Raises:
        ValueError: As ``meta_report``.
    """
    micro_batches: int = trainer.accumulate_grad_batches
    module.to("meta")  # buffers, which were computed
    trainer.precision_plugin.convert_module(module)  # as a strategy does it
    optimizer = _optimizer(module)
    report = meta_report(trainer, module, data, optimizer)
    if hardware is None:
        machine = machine_at_hand(torch.device("cpu"), torch.float32)
    else:
        machine = machine_of(trainer, module, hardware)
    setting = Setting(micro_batches=micro_batches, can_fuse=can_fuse(optimizer))
    return StepTime(report, machine), {}, advise(report, machine, setting)


def meta_report(
    trainer: pl.Trainer, module: pl.LightningModule, data: Any, optimizer: Optimizer
) -> StepReport:
    """What a step computes and moves, from shapes alone.

    Args:
        trainer: Of the run.
        module: On meta.
        data: The datamodule, which is not set up.
        optimizer: Of the parameters.

    Raises:
        ValueError: If the shape of a batch is not known beforehand, what trains differs from what
            would be analysed, or the model does not run without values.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, (LISA, OptimizerSwap)):
            rule = f"{type(callback).__name__} changes what trains, which is only seen in a run"
            raise argument_error("profile", "meta", True, rule, "Leave one of them out")
    precision = str(trainer.precision)
    if "mixed" in precision:
        rule = f"precision {precision} casts on a device, and there is none"
        way_out = "Set trainer.precision to 32-true, and the model's dtype to bfloat16"
        raise argument_error("profile", "meta", True, rule, way_out)
    batch = full_batch(module, data)
    micro_batches: int = trainer.accumulate_grad_batches

    def step() -> None:
        optimizer.zero_grad()
        for number in range(micro_batches):
            # Nothing is attached to the module, so that what it logs goes nowhere.
            with trainer.precision_plugin.forward_context():
                loss: Any = module.training_step(batch, number)
            loss.backward()
        optimizer.step()

    try:
        with nothing_is_odd():
            _make_states(optimizer)
            return analyze_step(module, step, optimizer=optimizer)
    except (RuntimeError, NotImplementedError) as error:
        rule = f"the model does not run without values ({str(error).splitlines()[0]})"
        raise argument_error("profile", "meta", True, rule, "Leave --meta out") from error


def full_batch(module: pl.LightningModule, data: Any) -> Batch:
    """The largest batch that a datamodule makes, on meta.

    Args:
        module: That is to train on it.
        data: The datamodule, which is not set up.

    Raises:
        ValueError: If its shape is only known with the data.
    """
    is_paired = isinstance(module, DPOModule) and not module.options.is_unpaired
    ids = partial(torch.zeros, dtype=torch.long, device="meta")
    if isinstance(data, TextDataModule):
        tokens = ids(data.batch_size, data.block_size + 1)
        return {"input_ids": tokens, "labels": tokens}
    if isinstance(data, ConversationDataModule):
        tokens = ids(data.batch_size, data.max_length)
        return {"input_ids": tokens, "labels": tokens}
    if isinstance(data, PreferenceDataModule) and is_paired:
        rows = ids(2 * data.batch_size, data.max_length)
        return {"input_ids": rows, "attention_mask": rows, "completion_mask": rows}
    rule = f"the shape of a batch of {type(data).__name__} is only known with its data"
    if isinstance(data, PreferenceDataModule):
        rule = "which completions an unpaired record is compared with is only known with the data"
    raise argument_error("profile", "meta", True, rule, "Leave --meta out")


def _optimizer(module: pl.LightningModule) -> Optimizer:
    made: Any = module.configure_optimizers()
    found = made["optimizer"] if isinstance(made, dict) else made
    if not isinstance(found, Optimizer):
        rule = f"{type(module).__name__} has not one optimizer, but {type(found).__name__}"
        raise argument_error("profile", "meta", True, rule, "Leave --meta out")
    return found


def _make_states(optimizer: Optimizer) -> None:
    """Let the optimizer make its states, as the first step of a run does: it is no usual one."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def nothing_is_odd() -> Iterator[None]:
    """Context in which all of a tensor on meta is true and nothing zero, but ``any`` is false.

    So models ask whether rows have padding or several documents, losses which tokens are learned
    and whether something is not finite. A ``TorchFunctionMode`` would not do: it is not there where
    a checkpoint calls forward again.
    """
    tensor: Any = Tensor
    theirs = {"all": tensor.all, "any": tensor.any}

    def answering(name: str, answer: bool) -> Callable[..., Any]:
        def of_values(tensor: Tensor, *args: Any, **options: Any) -> Any:
            if tensor.is_meta and not args and not options:
                return torch.tensor(answer)
            return theirs[name](tensor, *args, **options)

        return of_values

    tensor.all, tensor.any = answering("all", True), answering("any", False)
    try:
        with nothing_is_zero_on_meta():
            yield
    finally:
        del tensor.all, tensor.any  # they are a base class's
