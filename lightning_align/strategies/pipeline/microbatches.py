"""A batch cut into micro-batches of one size, and how two batches are compared."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_align._errors import argument_error


def batch_rows(batch: Any) -> int:
    """Rows of a batch: the size of its tensors' first dimension.

    Raises:
        ValueError: If its tensors have different first dimensions, or there are none.
    """
    sizes = {tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim}
    if len(sizes) != 1:
        rule = "its tensors must have one first dimension, the rows that micro-batches share"
        way_out = "Let the collate function stack samples in dimension 0"
        raise argument_error("PipelineStrategy", "batch", sorted(sizes), rule, way_out)
    return sizes.pop()


def split_batch(batch: Any, count: int) -> list[Any]:
    """``count`` micro-batches of as many rows each; what is not a tensor is in all of them."""
    rows = batch_rows(batch) // count

    def part(index: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor[index * rows : (index + 1) * rows] if tensor.ndim else tensor

    if count == 1:
        return [batch]
    return [apply_to_collection(batch, Tensor, part(index)) for index in range(count)]


def count_that_divides(rows: int, wanted: int) -> int:
    """The largest number of micro-batches, up to ``wanted``, that ``rows`` can be cut into."""
    return next(count for count in range(min(rows, wanted), 0, -1) if rows % count == 0)


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors of a batch, in one order."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def shape_key(batch: Any) -> Hashable:
    """What two batches share if one schedule serves both."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_of(batch))


def checksum(batch: Any) -> Tensor:
    """Three numbers that differ between batches: number of values, their sum, a weighted sum."""
    total = torch.zeros(3, dtype=torch.float64)
    for number, tensor in enumerate(tensors_of(batch), start=1):
        values = tensor.detach().to("cpu", torch.float64).flatten()
        weights = torch.arange(1, len(values) + 1, dtype=torch.float64) * number
        total += torch.stack([torch.tensor(float(len(values))), values.sum(), values @ weights])
    return total.nan_to_num()  # NaN equals nothing, not even itself
