"""Replicas of the model, which is another thing than ranks: parts of one model are one replica.

Ranks that share a replica see the same batch, add nothing to the mean of gradients, and each hold
a part of what a norm is over. The strategy says how it is.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_align.run.protocols import HoldsGradients, SpreadsModel


def replica(trainer: pl.Trainer) -> tuple[int, int]:
    """(number of replicas that gradients are averaged over, number of this rank's)."""
    ranks = trainer.distributed_sampler_kwargs
    return (ranks["num_replicas"], ranks["rank"]) if ranks else (1, 0)


def of_every_rank(trainer: pl.Trainer, own: Any) -> list[Any]:
    """What each rank gives, by rank. Collective: every rank must call it."""
    gathered = [own] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(gathered, own)
    return gathered


def added_up(own: Tensor) -> Tensor:
    """The sum of what all ranks have, in place; collective, and no device is waited for.

    Lightning's ``reduce`` has a barrier before each sum, which waits.
    """
    torch.distributed.all_reduce(own)
    return own


def total_grad_norm(trainer: pl.Trainer, module: nn.Module) -> Tensor:
    """Norm of a module's gradients, over all ranks that hold a part of it.

    Collective, where the strategy is a ``SpreadsModel`` or gradients are DTensors.
    """
    strategy: Any = trainer.strategy
    # Asked of the class, whose answer is remembered: this is in every step.
    if issubclass(type(strategy), SpreadsModel):
        spread: SpreadsModel = strategy
        return spread.total_grad_norm()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    # Of a sparse one the kernels know no norm, and rows that occur twice are to be added before.
    gradients = [each.coalesce().values() if each.is_sparse else each for each in gradients]
    norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def scale_gradients(trainer: pl.Trainer, module: nn.Module, factor: Tensor) -> None:
    """Multiply a module's gradients, where the strategy keeps them if it has them elsewhere."""
    strategy: Any = trainer.strategy
    if issubclass(type(strategy), HoldsGradients):
        holder: HoldsGradients = strategy
        holder.scale_gradients(factor)
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    torch._foreach_mul_(gradients, factor)


def is_spread(module: nn.Module) -> bool:
    """Whether a strategy has left parameters to other ranks, so that the model cannot be run."""
    return any(parameter.is_meta for parameter in module.parameters())
