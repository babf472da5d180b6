"""Attention on meta as it would run on the processor.

Without memory torch takes the unfused attention, whose scores are a tensor. Then a step on meta
would neither move the bytes nor need the memory of the real one. Here torch is asked which kernel
tensors of these shapes would get, and the same one is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_align._compat.torch_autograd import takes_flash_attention

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@contextmanager
def attention_of_processor() -> Iterator[None]:
    """Context in which attention on meta calls the kernel that the processor would.

    torch's function is replaced for a while. A ``TorchFunctionMode`` would not do: it is not there
    in backward, where a checkpoint calls forward again.
    """
    theirs = F.scaled_dot_product_attention
    vars(F)["scaled_dot_product_attention"] = partial(_attention, theirs)
    try:
        yield
    finally:
        vars(F)["scaled_dot_product_attention"] = theirs


def _attention(theirs: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    named = {**dict(zip(_NAMES, args, strict=False)), **options}
    if named["query"].is_meta and takes_flash_attention(**named):
        return _flash(**named)
    return theirs(*args, **options)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001 the kernel sees it from the shapes
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype is torch.bool:  # as torch does: 0 or -infinity
        zero = torch.scalar_tensor(0.0, dtype=query.dtype, device=query.device)
        never = torch.scalar_tensor(float("-inf"), dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, zero, never)
    kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found: Tensor = kernel(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return found
