"""What Lightning asks a strategy for: a step of the user's module on a batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_align.strategies.pipeline.microbatches import (
    batch_rows,
    count_that_divides,
    split_batch,
)

_COMPARED_ROWS = 8


@dataclass(frozen=True)
class BatchStep:
    """``call(batch, *rest)``, to be run as ``count`` micro-batches.

    Attributes:
        call: A step of the user's module.
        batch: The whole batch.
        rest: What Lightning passes the step after the batch.
        count: Number of micro-batches.
        context: Makes the precision plugin's context.
        trains: Whether it is ``training_step``, which returns a loss.
    """

    call: Callable[..., Any]
    batch: Any
    rest: tuple[Any, ...]
    count: int
    context: Callable[[], AbstractContextManager[Any]]
    trains: bool = False

    @property
    def name(self) -> str:
        """Of the method."""
        return self.call.__name__

    @property
    def kind(self) -> str:
        """The method, and the data loader of several that its batch is from."""
        return f"{self.name}{self.rest[1:]}"

    def microbatches(self) -> list[Any]:
        """The batch, cut."""
        return split_batch(self.batch, self.count)

    def sample(self) -> BatchStep:
        """A few of its rows, as that many micro-batches or as many as they can be cut into."""
        if batch_rows(self.batch) <= _COMPARED_ROWS:
            return self
        rows = apply_to_collection(
            self.batch, Tensor, lambda tensor: tensor[:_COMPARED_ROWS] if tensor.ndim else tensor
        )
        return replace(self, batch=rows, count=count_that_divides(_COMPARED_ROWS, self.count))
