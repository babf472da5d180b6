"""What a run would stumble over in its first step, told at set-up where it can be known there.

The first batch is made once more for this, with the loader's own sampler but without its workers,
and its shapes are run through the stages. Nothing of that is left: not in the generators, not in
the loader, not in the module's buffers.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils import data

from lightning_align._compat.lightning_trainer import transferred
from lightning_align._errors import argument_error
from lightning_align.data.sampler import PositionSampler
from lightning_align.run.protocols import arranged
from lightning_align.strategies.pipeline.batch_step import BatchStep
from lightning_align.strategies.pipeline.checks import check_batch, check_same
from lightning_align.strategies.pipeline.comparison import keeps_statistics
from lightning_align.strategies.pipeline.microbatches import batch_rows
from lightning_align.strategies.pipeline.stages import StageError
from lightning_align.strategies.pipeline.steps import PipelineSteps
from lightning_align.strategies.pipeline.trees import leaves

# Iterating over one of these changes nothing but generators, which are put back.
_PURE_SAMPLERS = (
    data.SequentialSampler,
    data.RandomSampler,
    data.DistributedSampler,
    PositionSampler,
)


def rehearse(
    trainer: pl.Trainer,
    steps: PipelineSteps,
    num_microbatches: int | None,
    count_for: Callable[[Any], int],
) -> None:
    """Refuse a first batch that the pipeline could not train on; collective.

    A resumed run, whose place in the data is not known yet, and loaders whose batches cannot be had
    twice are left to the first step.

    Args:
        trainer: The trainer, at set-up.
        steps: What will run the batches.
        num_microbatches: What the user asked for.
        count_for: How many a batch is cut into.

    Raises:
        ValueError: If ranks have different batches, a batch cannot be cut into as many
            micro-batches, a stage hands on anything but tensors, or micro-batches do not come to
            what their rows come to in one piece.
    """
    module: Any = steps.chain.module
    check_training_step(module)
    if normed := keeps_statistics(module):
        rank_zero_warn(
            "PipelineStrategy: batch norm and spectral norm go by the statistics of one"
            f" micro-batch: {', '.join(normed[:3])}. LayerNorm does not"
        )
    if trainer.ckpt_path or steps.runtime.num_stages == 1:
        return
    _rehearse_training(trainer, steps, num_microbatches, count_for)
    # Lightning's own first batches of validation come before training, if it has any.
    if trainer.enable_validation and not trainer.num_sanity_val_steps:
        _rehearse_validation(trainer, steps, count_for)


def _rehearse_training(
    trainer: pl.Trainer,
    steps: PipelineSteps,
    num_microbatches: int | None,
    count_for: Callable[[Any], int],
) -> None:
    module: Any = steps.chain.module
    trainer.fit_loop.setup_data()  # as trainer.estimated_stepping_batches does
    if getattr(trainer.train_dataloader, "batch_size", None):  # a sampler's may count batches
        check_batch(trainer, 0, num_microbatches)
    with isolate_rng():
        batch = first_batch(trainer, trainer.train_dataloader)
        if not trainer.strategy.reduce_boolean_decision(batch is not None):
            return
        batch = arranged(module, batch)
        check_same(batch, steps.runtime.group, steps.runtime.device)
        check_batch(trainer, batch_rows(batch), num_microbatches)
        # Hooks that run before the first step may be missing; if not, it says the same.
        with suppress(StageError):
            call, context = module.training_step, trainer.precision_plugin.train_step_context
            rest = step_arguments(module)
            steps.rehearse(BatchStep(call, batch, rest, count_for(batch), context, trains=True))


def _rehearse_validation(
    trainer: pl.Trainer, steps: PipelineSteps, count_for: Callable[[Any], int]
) -> None:
    """With the first batch of each loader, so that no epoch is trained before a refusal."""
    module: Any = steps.chain.module
    trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loaders = list(leaves(trainer.val_dataloaders))
    was_training = [part for part in module.modules() if part.training]
    module.eval()
    with isolate_rng():
        for number, loader in enumerate(loaders):
            batch = first_batch(trainer, loader)
            if not trainer.strategy.reduce_boolean_decision(batch is not None):
                continue
            batch = arranged(module, batch)
            check_same(batch, steps.runtime.group, steps.runtime.device)
            has_index = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
            rest = (*[0] * has_index, *[number] * (len(loaders) > 1))
            call, context = module.validation_step, trainer.precision_plugin.val_step_context
            with suppress(StageError):
                steps.rehearse(BatchStep(call, batch, rest, count_for(batch), context))
    for part in was_training:
        part.training = True


def step_arguments(module: pl.LightningModule) -> tuple[int, ...]:
    """What Lightning passes the first ``training_step`` after the batch."""
    has_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return (0,) if has_index else ()


def check_training_step(module: pl.LightningModule) -> None:
    """Refuse a step that never returns a value, as far as its source tells.

    Raises:
        ValueError: If it has no ``return`` with a value.
    """
    try:
        source = inspect.getsource(inspect.unwrap(module.training_step))
        (step,) = ast.parse(textwrap.dedent(source)).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return
    if not isinstance(step, ast.FunctionDef) or isinstance(step.body[-1], ast.Raise):
        return
    if not any(_gives_value(node) for node in _own_nodes(step)):
        rule = "must return its loss under a pipeline, and has no return with a value"
        way_out = "End it with `return loss`"
        raise argument_error(type(module).__name__, "training_step", "...", rule, way_out)


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function without those of functions inside it."""
    for node in ast.iter_child_nodes(function):
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield from _own_nodes(node)


def _gives_value(node: ast.AST) -> bool:
    if isinstance(node, (ast.Yield, ast.YieldFrom)):
        return True
    value = node.value if isinstance(node, ast.Return) else None
    return value is not None and not (isinstance(value, ast.Constant) and value.value is None)


def first_batch(trainer: pl.Trainer, loader: Any) -> Any:
    """The first batch as a step gets it, or None if it cannot be had without a trace."""
    if not isinstance(loader, data.DataLoader) or isinstance(loader.dataset, data.IterableDataset):
        return None
    order: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    sampler = order.sampler if type(order) is data.BatchSampler else order
    if type(sampler) not in _PURE_SAMPLERS:
        return None
    generator = getattr(sampler, "generator", None)
    state = generator.get_state() if generator is not None else None
    try:
        indices: Any = next(iter(order))
        dataset: Any = loader.dataset
        if loader.batch_sampler is None:
            samples = dataset[indices]
        elif hasattr(dataset, "__getitems__"):
            samples = dataset.__getitems__(indices)
        else:
            samples = [dataset[index] for index in indices]
        return transferred(trainer, loader.collate_fn(samples))
    except Exception:
        return None  # the first step tells, where it belongs
    finally:
        if generator is not None:
            generator.set_state(state)
