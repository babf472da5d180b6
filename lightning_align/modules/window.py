"""Sums that a module collects over its batches, their means over all ranks, and the log of a step.

A window is what one optimizer step learns from: all accumulated batches on all ranks. A mean over
it is a sum of sums over a sum of weights, never a mean of means.
"""

import math
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_align._compat.lightning_trainer import log_step_value

# name -> (sum, weight), whose quotient is the mean to log; "loss" weighs the gradient, too. A sum
# may be a vector, which is not logged.
Sums = dict[str, tuple[Tensor, Tensor]]


class StepNotes:
    """What concerns one step alone, and is no state of a run.

    Attributes:
        began: When it did, by this process's clock.
        measured: Mean loss and gradient norm of its window, over all ranks; None without a loss.
        tokens: How many it counts as learned from.
        totals: Vectors summed up over the latest window, or evaluation, and all ranks.
    """

    began: float | None = None
    measured: tuple[Tensor, Tensor] | None = None
    tokens: Tensor | None = None
    totals: Mapping[str, Tensor] = MappingProxyType({})

    def __getstate__(self) -> dict[str, float]:
        return {}


def collect(sums: Sums, collected: dict[str, Tensor]) -> None:
    """Add the sums of a batch, [*sum, weight] by name, to what was collected before."""
    for name, pair in sums.items():
        packed = torch.cat([value.detach().float().reshape(-1) for value in pair])
        collected[name] = collected[name] + packed if name in collected else packed


def means_over_ranks(
    trainer: pl.Trainer, collected: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(means, weights) by name of what all ranks collected; empties ``collected``.

    "tokens" stands among the means as a sum.
    """
    names = sorted(collected)
    ours = [collected[name] for name in names]
    sums = trainer.strategy.reduce(torch.cat(ours), reduce_op="sum").split([*map(len, ours)])
    collected.clear()
    weights = {name: packed[-1].clamp(min=1) for name, packed in zip(names, sums, strict=True)}
    totals = {
        name: packed[0] if len(packed) == 2 else packed[:-1]
        for name, packed in zip(names, sums, strict=True)
    }
    means = {name: total / weights[name] for name, total in totals.items()}
    means["tokens"] = totals["tokens"]  # how many in all, not how many a batch
    return means, weights


def take_totals(means: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the vectors out of the means, which are logged, and make them sums again."""
    vectors = [name for name, mean in means.items() if mean.ndim]
    return {name: means.pop(name) * weights[name] for name in vectors}


def log_step(
    module: pl.LightningModule,
    values: dict[str, Tensor],
    tokens: Tensor,
    notes: StepNotes,
    shown: Sequence[str],
) -> None:
    """Log the values of an optimizer step, and how fast it has gone through its tokens.

    Args:
        module: What logs.
        values: Of the step, by name.
        tokens: How many the step has gone through.
        notes: When the step before ended.
        shown: Names that the progress bar shows beside the speed.
    """
    now = time.perf_counter()
    if notes.began is not None:
        values["tokens_per_second"] = tokens / (now - notes.began)
    for name, value in values.items():
        log_step_value(module, name, value, prog_bar=name in shown or name == "tokens_per_second")
    notes.began = now


def perplexity(mean_nll: Tensor) -> Tensor:
    """Exponential of a mean negative log-likelihood in nats; infinite where it overflows."""
    return mean_nll.clamp(max=math.log(torch.finfo(torch.float32).max)).exp()
