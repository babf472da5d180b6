"""Loss and gradient norm of a window, where the verdict on its step falls.

A module that has both hands them over, reduced over ranks and divided by the window's weight. Of
any other module the losses are those of its backwards, and the norm is taken once.
"""

import math
from typing import Any, NamedTuple, cast

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


def scaler_of(trainer: pl.Trainer) -> Any:
    """The loss scaler of mixed precision in fp16, None without one."""
    return getattr(trainer.precision_plugin, "scaler", None)


class Overflows:
    """Steps that a loss scaler leaves out by itself, because its scale was too large.

    Attributes:
        in_a_row: How many of them until now.
    """

    # From torch's first scale of 2^16 down to 1: what still overflows then is no matter of scale.
    LONGEST = 16

    def __init__(self) -> None:
        self.in_a_row = 0

    def is_one(self, trainer: pl.Trainer, measured: Measured) -> bool:
        """Whether this step is one, and not one too many of them."""
        norm_alone = math.isfinite(measured.loss) and not math.isfinite(measured.grad_norm)
        self.in_a_row = self.in_a_row + 1 if norm_alone and scaler_of(trainer) is not None else 0
        return 0 < self.in_a_row <= self.LONGEST


class WindowLosses:
    """Losses of the open window's batches on this rank, which are waited for when it closes.

    Attributes:
        losses: They.
        told: Whether the module will say what its window came to.
    """

    def __init__(self) -> None:
        self.told = False
        self.losses: list[Tensor] = []
        self._scale: float | None = None  # of the loss, in this window

    def begin(self, module: pl.LightningModule) -> None:
        """Ask once what is asked in every step."""
        self.told = isinstance(module, MeasuresSteps) and _is_measured(module.measured_step)

    def add(self, trainer: pl.Trainer, loss: Tensor) -> Tensor:
        """Take a loss that is about to be propagated back, and return that of the batch itself."""
        # Lightning has divided it, and a loss scaler has multiplied it.
        if self._scale is None:
            scaler = scaler_of(trainer)
            self._scale = 1.0 if scaler is None else scaler.get_scale()
        own = loss.detach().float() * (trainer.accumulate_grad_batches / self._scale)
        self.losses.append(own)
        return own

    def plain(self) -> list[float]:
        """Those of the open window so far, as numbers."""
        return [float(loss) for loss in self.losses]

    def restore(self, losses: list[float]) -> None:
        """Let these be the open window's so far."""
        self.losses = [torch.tensor(loss) for loss in losses]

    def close(self, trainer: pl.Trainer, module: pl.LightningModule) -> Measured | None:
        """What the window came to; None if no batch of it had a loss. Waits for the device.

        Collective, unless the module hands both values over.
        """
        losses, self.losses, self._scale = self.losses, [], None
        if self.told:
            measured = cast(MeasuresSteps, module).measured_step
            return None if measured is None else _numbers(*measured)
        if not losses:
            return None
        mean = torch.stack([loss.to(losses[-1].device) for loss in losses]).mean()
        ours = torch.stack([mean, total_grad_norm(trainer, module).to(mean)])
        # A NaN of one rank is everybody's in a mean.
        return _numbers(*trainer.strategy.reduce(ours, reduce_op="mean"))


def _is_measured(value: Any) -> bool:
    """Whether it is what the protocol says; a module of one's own may mean something else."""
    is_pair = isinstance(value, tuple) and len(value) == 2
    return value is None or (is_pair and all(isinstance(each, Tensor) for each in value))


def _numbers(loss: Tensor, norm: Tensor) -> Measured:
    return Measured(float(loss), float(norm))
