"""A mask of rows of pairs that also knows its pairs, so that attention on a CPU runs these alone.

It is a tensor like the one it stands for. Given to ``scaled_dot_product_attention`` it has
``row_attention`` run; whoever does anything else with it gets the mask written out.

Shapes: R rows of L places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_align._compat import torch_attention as kernel
from lightning_align.losses.pair_layout import PairLayout
from lightning_align.losses.row_attention import Stretch, row_attention, stretches

_TENSOR: Any = Tensor  # whose properties have getters

# As it was at first: who analyses a step puts another function into its place for a while.
_ATTENTION = F.scaled_dot_product_attention
# What may be asked of a mask without it being written out.
_FACTS = frozenset(
    {
        _TENSOR.shape.__get__,
        _TENSOR.dtype.__get__,
        _TENSOR.device.__get__,
        _TENSOR.ndim.__get__,
        _TENSOR.requires_grad.__get__,
        Tensor.size,
        Tensor.dim,
        Tensor.is_floating_point,
    }
)


class PairMask(Tensor):
    """``layout.visible()``, (R, 1, L, L), which is written out only if somebody looks at it."""

    _layout: PairLayout
    _plan: list[Stretch]
    _written: Tensor | None

    @classmethod
    def of(cls, layout: PairLayout) -> PairMask:
        """The mask of a layout on a CPU, for layers that see all of a sequence."""
        rows, width = layout.pair_RL.shape
        mask = torch.ones((), dtype=torch.bool).expand(rows, 1, width, width).as_subclass(cls)
        mask._layout, mask._plan, mask._written = layout, plan_of(layout), None
        return mask

    @property
    def is_written(self) -> bool:
        """Whether anybody has looked at it."""
        return self._written is not None

    def written(self) -> Tensor:
        """The mask as any other."""
        if self._written is None:
            self._written = self._layout.visible()
        return self._written

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func in _FACTS:
            return super().__torch_function__(func, types, args, options)  # type: ignore[no-untyped-call]
        if func is _ATTENTION and len(args) == 3:
            mask = options.get("attn_mask")
            if isinstance(mask, cls) and mask._fits(args, options):
                query, key, value = args
                return row_attention(query, key, value, mask._plan, options.get("scale"))
        return func(*_written_out(args), **_written_out(options))

    def _fits(self, tensors: Sequence[Tensor], options: dict[str, Any]) -> bool:
        """Whether the kernel takes these queries, keys and values, and they are of these rows."""
        query, rows, width = tensors[0], self.shape[0], self.shape[2]
        if options.get("dropout_p") or options.get("is_causal") or not kernel.is_here():
            return False
        # What sdpa_kernel() chose, which holds on a CPU, too.
        if not torch.backends.cuda.flash_sdp_enabled():  # type: ignore[no-untyped-call]
            return False
        if torch.is_autocast_enabled("cpu") and query.dtype != torch.get_autocast_dtype("cpu"):
            return False
        alike = all(
            (each.shape, each.dtype, each.stride(-1)) == (query.shape, query.dtype, 1)
            for each in tensors
        )
        return alike and query.ndim == 4 and query.shape[0::2] == (rows, width)


def plan_of(layout: PairLayout) -> list[Stretch]:
    """Who sees what in the rows of a layout, read on the host."""
    plan = []
    codes_RL = 3 * layout.pair_RL + layout.part_RL
    for row, (codes_L, pair_L) in enumerate(zip(codes_RL, layout.pair_RL, strict=True)):
        codes, counts = codes_L[pair_L >= 0].unique_consecutive(return_counts=True)
        sizes: dict[int, list[int]] = {}  # of each pair: shared, chosen, rejected
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            sizes.setdefault(code // 3, [0, 0, 0])[code % 3] = count
        first = 0  # pairs follow each other without a gap
        for of_pair in sizes.values():
            plan += stretches(row, first, *of_pair)
            first += sum(of_pair)
    return plan


def _written_out(given: Any) -> Any:
    """What a function was given, with the masks in it as any others."""
    if isinstance(given, PairMask):
        return given.written()
    if isinstance(given, dict):
        return {name: _written_out(value) for name, value in given.items()}
    if isinstance(given, (list, tuple)) and not isinstance(given, torch.Size):
        return cast(Any, type(given))(map(_written_out, given))
    return given
