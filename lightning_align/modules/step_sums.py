"""A sum over the ranks in each step, for what the loss of a step is a function of (the KL of kto).

Training steps are taken together, for gradients are averaged. In an evaluation a rank may have
fewer batches than another one, and would leave it waiting: so a rank at its end goes on adding
nothing, until all are there, which each message says.
"""

import lightning.pytorch as pl
import torch
from torch import Tensor


def sum_of_step(trainer: pl.Trainer, values: Tensor) -> Tensor:
    """``values``, a vector, added up over the ranks that take a step now. Collective."""
    if trainer.world_size == 1:
        return values
    return _sum(trainer, torch.cat([values, values.new_zeros(1)]))[:-1]


def sums_without_steps(trainer: pl.Trainer, length: int, device: torch.device) -> None:
    """Take part in the sums of the ranks that have batches left, until none has. Collective."""
    if trainer.world_size == 1:
        return
    at_end = torch.zeros(length + 1, device=device)
    at_end[-1] = 1
    while _sum(trainer, at_end.clone())[-1] < trainer.world_size:
        pass


def _sum(trainer: pl.Trainer, values: Tensor) -> Tensor:
    summed: Tensor = trainer.strategy.reduce(values.float(), reduce_op="sum")
    return summed
