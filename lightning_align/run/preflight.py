"""A forward and backward of which nothing is left: does a batch go through the module at all?

What a run will meet only after hours, such as rows that are longer, is met before its first step.
To leave no trace

- gradients are asked for by ``torch.autograd.grad``: nothing is added up in ``p.grad``, and no hook
  of an optimizer that steps in backward, nor DDP's, is called;
- the step's logs go nowhere (``_compat/lightning_logged.py``), generators are put back, and so are
  buffers, metrics and attributes of the module (attributes.py).

Not put back is what a step does elsewhere: to files, or to objects of the user that are no
attribute of the module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_align._compat import lightning_logged
from lightning_align._compat.lightning_trainer import transferred
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.exact_resume import ExactResume
from lightning_align.run.protocols import has_replicas
from lightning_align.run.rng import undrawn


def no_preflight(trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
    """Why a step of this run cannot be tried out, None if it can."""
    if not module.automatic_optimization:
        return f"{type(module).__name__} optimizes manually, within its step"
    if not has_replicas(trainer.strategy):
        return f"{type(trainer.strategy).__name__} runs steps its own way"
    if any(map(is_lazy, module.parameters())):
        return f"{type(module).__name__} has parameters that its first step makes"
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return f"{type(module).__name__} draws its batches itself"
    return None


def preflight(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
    """Let a batch go forward and backward, to be called in a hook of the start of a batch.

    Args:
        trainer: Who fits. It must have ``ExactResume``.
        module: Its module.
        batch: As a loader yields it; not yet moved.

    Raises:
        RuntimeError: Whatever the step meets, such as that memory does not suffice.
    """
    unseen = lightning_logged.logging_apart(trainer)
    with undrawn(module.device), unseen, _as_it_was(trainer, module):
        given = transferred(trainer, batch)
        module.on_train_batch_start(given, 0)  # the step may read what it sets
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        with trainer.precision_plugin.train_step_context():
            output = module.training_step(given, *[0] * takes_index)
        loss = output.get("loss") if isinstance(output, dict) else output
        learns = [p for p in module.parameters() if p.requires_grad]
        if isinstance(loss, Tensor) and loss.requires_grad:
            torch.autograd.grad(loss, learns, allow_unused=True)


@contextmanager
def _as_it_was(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Context behind which a module has the attributes, metrics and buffers that it had."""
    keepers = [each.keeper for each in callbacks_of(trainer) if isinstance(each, ExactResume)]
    attributes = next(each.attributes for each in keepers if each.attributes is not None)
    now = attributes.now()
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    metrics = [each for each in module.modules() if isinstance(each, Metric)]
    states = [(dict(vars(each)), lightning_logged.capture_metric(each)) for each in metrics]
    hook = module._current_fx_name
    module._current_fx_name = "training_step"
    try:
        yield
    finally:
        module._current_fx_name = hook
        for metric, (values, state) in zip(metrics, states, strict=True):
            vars(metric).clear()
            vars(metric).update(values)
            lightning_logged.restore_metric(metric, state)
        for buffer, value in buffers:
            buffer.detach().copy_(value)
        attributes.replace(now)
