"""Sums that a module collects over its batches, their means over all ranks, and the log of a step.

A window is what one optimizer step learns from: all accumulated batches on all ranks. A mean over
it is a sum of sums over a sum of weights, never a mean of means.
"""

import math
import time

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_align._compat.lightning_trainer import log_step_value

# name -> (sum, weight), whose quotient is the mean to log; "loss" weighs the gradient, too.
Sums = dict[str, tuple[Tensor, Tensor]]


class StepNotes:
    """What concerns one step alone, and is no state of a run.

    Attributes:
        began: When it did, by this process's clock.
        measured: Mean loss and gradient norm of its window, over all ranks; None without a loss.
        tokens: How many it counts as learned from.
    """

    began: float | None = None
    measured: tuple[Tensor, Tensor] | None = None
    tokens: Tensor | None = None

    def __getstate__(self) -> dict[str, float]:
        return {}


def collect(sums: Sums, collected: dict[str, Tensor]) -> None:
    """Add the sums of a batch, [sum, weight] by name, to what was collected before."""
    for name, pair in sums.items():
        packed = torch.stack([value.detach().float() for value in pair])
        collected[name] = collected[name] + packed if name in collected else packed


def means_over_ranks(
    trainer: pl.Trainer, collected: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(means, weights) by name of what all ranks collected; empties ``collected``.

    "tokens" stands among the means as a sum.
    """
    names = sorted(collected)
    ours = torch.stack([collected[name] for name in names])
    sums = trainer.strategy.reduce(ours, reduce_op="sum")
    collected.clear()
    weights = dict(zip(names, sums[:, 1].clamp(min=1), strict=True))
    means = {name: total / weights[name] for name, total in zip(names, sums[:, 0], strict=True)}
    means["tokens"] = sums[names.index("tokens"), 0]  # how many in all, not how many a batch
    return means, weights


def log_step(
    module: pl.LightningModule, values: dict[str, Tensor], tokens: Tensor, notes: StepNotes
) -> None:
    """Log the values of an optimizer step, and how fast it has gone through its tokens."""
    now = time.perf_counter()
    if notes.began is not None:
        values["tokens_per_second"] = tokens / (now - notes.began)
    for name, value in values.items():
        log_step_value(module, name, value, prog_bar=name in ("train_loss", "tokens_per_second"))
    notes.began = now


def perplexity(mean_nll: Tensor) -> Tensor:
    """Exponential of a mean negative log-likelihood in nats; infinite where it overflows."""
    return mean_nll.clamp(max=math.log(torch.finfo(torch.float32).max)).exp()
