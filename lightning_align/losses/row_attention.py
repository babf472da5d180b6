"""Attention in rows of pairs on a CPU: of each block of queries on the keys that it sees.

PyTorch's kernel for a CPU takes any mask and skips nothing of it. Here it is called for a block of
queries at a time, on the keys up to the last of them, so that nobody is compared with another pair,
with the other completion, or with what comes more than a block later.

Shapes: R rows of L places; H heads of width D.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_align._compat import torch_attention as kernel

# Smaller blocks compare less in vain, and make more calls.
BLOCK = 64


class Stretch(NamedTuple):
    """Tokens that follow each other in a row, and what they see besides what is behind them.

    Attributes:
        row: Number of the row.
        places: Where what they see stands, up to and with themselves.
        begin: Place of the first of them.
        size: How many they are.
        before: How many tokens are seen by the first of them, without itself.
    """

    row: int
    places: tuple[slice, ...]
    begin: int
    size: int
    before: int

    def blocks(self) -> Iterator[tuple[tuple[Any, ...], int]]:
        """Index of queries in (R, H, L, D), and how many keys the last of them sees."""
        for first in range(0, self.size, BLOCK):
            last = min(first + BLOCK, self.size)
            queries = slice(self.begin + first, self.begin + last)
            yield (slice(self.row, self.row + 1), slice(None), queries), self.before + last

    def seen(self, tensor_RHLD: Tensor) -> Tensor:
        """What they see, (1, H, before + size, D)."""
        parts = [tensor_RHLD[self.row : self.row + 1, :, places] for places in self.places]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def add_to_seen(self, tensor_RHLD: Tensor, value: Tensor) -> None:
        """Add to it there, in place."""
        first = 0
        for places in self.places:
            size = places.stop - places.start
            tensor_RHLD[self.row, :, places] += value[0, :, first : first + size]
            first += size


def stretches(row: int, first: int, shared: int, chosen: int, rejected: int) -> list[Stretch]:
    """The two of a pair: [shared, chosen], and the rejected tokens, which see the shared ones.

    Args:
        row: Number of its row.
        first: Its first place.
        shared: Tokens that both sequences begin with.
        chosen: Tokens behind them, of the chosen sequence alone.
        rejected: Tokens behind those, of the rejected sequence alone.
    """
    middle, end = first + shared + chosen, first + shared + chosen + rejected
    of_both, own = slice(first, first + shared), slice(middle, end)
    return [
        Stretch(row, (slice(first, middle),), first, shared + chosen, 0),
        Stretch(row, (of_both, own), middle, rejected, shared),
    ]


def row_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: list[Stretch], scale: float | None = None
) -> Tensor:
    """Attention of each token to what it sees, (R, H, L, D); zeros where no stretch is.

    Args:
        query: (R, H, L, D) on a CPU, as all of them.
        key: The same.
        value: The same.
        plan: Who sees what.
        scale: Of the products; None for 1 / sqrt(D).
    """
    attended: Tensor = _RowAttention.apply(query, key, value, plan, scale)  # type: ignore[no-untyped-call]
    return attended


class _RowAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: list[Stretch],
        scale: float | None,
    ) -> Tensor:
        rows, heads, width, _ = query.shape
        # As the kernel lays it out, so that models need no copy of it.
        out = query.new_zeros(rows, width, *value.shape[1::2]).transpose(1, 2)
        dtype = torch.promote_types(query.dtype, torch.float32)
        log_sum = query.new_zeros(rows, width, heads, dtype=dtype).transpose(1, 2)
        tail = _tail(plan, query)
        for stretch in plan:
            keys, values = stretch.seen(key), stretch.seen(value)
            for queries, seen in stretch.blocks():
                tensors = query[queries], keys[:, :, :seen], values[:, :, :seen]
                results = kernel.forward(*tensors, _mask(tail, tensors), scale)
                out[queries], log_sum[queries] = results
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # with create_graph=True
            raise RuntimeError(
                "row_attention: its gradient cannot be differentiated again, so create_graph must"
                " be False. For second derivatives use torch.nn.attention.sdpa_kernel(MATH)."
            )
        query, key, value, out, log_sum = ctx.saved_tensors
        gradients = [torch.zeros_like(each) for each in (query, key, value)]
        tail = _tail(ctx.plan, query)
        for stretch in ctx.plan:
            keys, values = stretch.seen(key), stretch.seen(value)
            sums = [torch.zeros_like(keys), torch.zeros_like(values)]
            for queries, seen in stretch.blocks():
                tensors = query[queries], keys[:, :, :seen], values[:, :, :seen]
                results = out[queries], log_sum[queries]
                mask = _mask(tail, tensors)
                dquery, *others = kernel.backward(grad[queries], tensors, results, mask, ctx.scale)
                gradients[0][queries] = dquery
                for total, part in zip(sums, others, strict=True):
                    total[:, :, :seen] += part
            for gradient, total in zip(gradients[1:], sums, strict=True):
                stretch.add_to_seen(gradient, total)
        return (*gradients, None, None)


def _tail(plan: list[Stretch], like: Tensor) -> Tensor:
    """Mask of the last queries of the longest sequence, of which those of all blocks are parts."""
    longest = max([BLOCK, *(stretch.before + stretch.size for stretch in plan)])
    mask = like.new_full((BLOCK, longest), -torch.inf)
    return mask.triu_(longest - BLOCK + 1)[None, None]


def _mask(tail: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    queries, keys = (each.shape[2] for each in tensors[:2])
    return tail[:, :, tail.shape[2] - queries :, tail.shape[3] - keys :]
