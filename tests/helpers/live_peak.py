"""The most bytes that live at a time in a step of a run: every storage once, whoever made it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_align.planner.trace import tracing


def there_before(
    modules: Iterable[nn.Module], optimizer: Optimizer, *batch: Tensor
) -> list[Tensor]:
    """Tensors that live when a step begins. Whoever traces clears the list: gradients go in it."""
    weights = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    gradients = [t.grad for t in weights]
    states = [value for state in optimizer.state.values() for value in state.values()]
    every = (*weights, *gradients, *states, *batch)
    # Under a pipeline hooks are lent the weights of other ranks.
    own = (Tensor, nn.Parameter)
    return [t for t in every if type(t) in own and not t.is_meta]


class LivePeak(pl.Callback):
    """Follows one batch from before its forward to behind its update.

    Args:
        batch_idx: Which one.

    Attributes:
        peak: In bytes.
        states: Bytes of the optimizer's state behind it.
    """

    def __init__(self, batch_idx: int = 2) -> None:
        self.batch_idx = batch_idx
        self.peak = self.states = 0
        self._stack = ExitStack()

    @override
    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx != self.batch_idx:
            return
        frozen = pl_module.frozen_modules().values() if hasattr(pl_module, "frozen_modules") else ()
        there = there_before([pl_module, *frozen], trainer.optimizers[0], *batch.values())
        self._trace = self._stack.enter_context(tracing(pl_module, there))
        there.clear()

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch_idx:
            self.peak = self._trace.storages.peak
            self._stack.close()
            states = [v for s in trainer.optimizers[0].state.values() for v in s.values()]
            self.states = sum(value.nbytes for value in states if isinstance(value, Tensor))
