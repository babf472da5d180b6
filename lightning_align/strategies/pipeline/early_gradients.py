"""Gradients that are there before Lightning's backward: the schedule has made them.

Lightning's closure:   training_step       zero_grad        backward    hooks, clipping, step
here:                  forward, backward   does nothing,    hooks only
of all micro-       or they would
batches             be lost
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_align._errors import argument_error
from lightning_align.strategies.pipeline.chain import WHERE


class EarlyGradients:
    """Keeps them from ``training_step`` until Lightning has come to its backward.

    Args:
        module: The user's module.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module, self._count = module, 0
        self._here = self._with_values()  # a resumed run may begin in the middle of a window

    def begin_window(self) -> None:
        """Forget those of the last accumulation window.

        By None, not by zeros: what gets no gradient is left alone by an optimizer.
        """
        self._here = self._with_values()
        for parameter in self._here:
            parameter.grad = None

    def keep(self, optimizers: Sequence[Optimizer]) -> None:
        """From here on the optimizers zero nothing."""
        self._count = self._counted()
        for optimizer in optimizers:
            vars(optimizer)["zero_grad"] = _nothing

    def release(self, optimizers: Sequence[Optimizer]) -> None:
        """From here on they zero again.

        Raises:
            ValueError: If gradients were zeroed in another way.
        """
        for optimizer in optimizers:
            vars(optimizer).pop("zero_grad", None)
        if self._counted() != self._count:
            name = f"{type(self._module).__name__}.optimizer_zero_grad"
            rule = "must zero gradients through optimizer.zero_grad only"
            raise argument_error(WHERE, "model", name, rule, "Remove the override")

    def _with_values(self) -> list[Tensor]:
        return [parameter for parameter in self._module.parameters() if not parameter.is_meta]

    def _counted(self) -> int:
        return sum(parameter.grad is not None for parameter in self._here)


def _nothing(*_: Any, **__: Any) -> None:
    """In place of ``zero_grad``."""
