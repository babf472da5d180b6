"""Loss and gradient norm of a window, where the verdict on its step falls.

A module that has both hands them over, reduced over ranks and divided by the window's weight. Of
any other module the losses are those of its backwards, and the norm is taken once.
"""

import math
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_align.run.protocols import MeasuresSteps
from lightning_align.run.replicas import total_grad_norm


class Measured(NamedTuple):
    """Of one window, over all ranks.

    Attributes:
        loss: Mean loss.
        grad_norm: Norm of the gradients as they are before clipping.
    """

    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether both are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class WindowLosses:
    """Losses of the open window's batches on this rank, which are waited for when it closes."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self._scale: float | None = None  # of the loss, in this window

    def add(self, trainer: pl.Trainer, loss: Tensor) -> Tensor:
        """Take a loss that is about to be propagated back, and return that of the batch itself."""
        # Lightning has divided it, and a loss scaler has multiplied it.
        if self._scale is None:
            scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
            self._scale = 1.0 if scaler is None else scaler.get_scale()
        own = loss.detach().float() * (trainer.accumulate_grad_batches / self._scale)
        self.losses.append(own)
        return own

    def close(self, trainer: pl.Trainer, module: pl.LightningModule) -> Measured | None:
        """What the window came to; None if no batch of it had a loss. Waits for the device.

        Collective, unless the module hands both values over.
        """
        losses, self.losses, self._scale = self.losses, [], None
        if isinstance(module, MeasuresSteps):
            measured = module.measured
            return None if measured is None else _numbers(*measured)
        if not losses:
            return None
        norm = total_grad_norm(trainer, module).to(losses[0])
        ours = torch.stack([torch.stack(losses).mean(), norm])
        # A NaN of one rank is everybody's in a mean.
        return _numbers(*trainer.strategy.reduce(ours, reduce_op="mean"))


def _numbers(loss: Tensor, norm: Tensor) -> Measured:
    return Measured(*torch.stack([loss.float(), norm.to(loss).float()]).tolist())
