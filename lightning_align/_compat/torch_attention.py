"""PyTorch's kernel of attention for a CPU, forward and backward as two calls.

``scaled_dot_product_attention`` records each call for itself, so of many calls on overlapping parts
of one tensor each would fill a whole gradient with zeros. Two operators of torch do the work; where
they are not there, or want other arguments, ``is_here`` says so.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

_aten: Any = torch.ops.aten
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of (B, H, Q, D) to (B, H, K, D) in both senses, and what backward wants of it.

    Args:
        query: Contiguous in its last dimension, as all of them.
        key: Of the same dtype, as all of them.
        value: As wide as the keys.
        mask: Added to the products, (1, 1, Q, K).
        scale: Of the products; None for 1 / sqrt(D).
    """
    run = getattr(_aten, _FORWARD)
    out, log_sum = run(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    return out, log_sum


def backward(
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    mask: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    Args:
        grad: Of the attention.
        tensors: Query, key and value.
        results: What ``forward`` gave.
        mask: As there.
        scale: As there.
    """
    run = getattr(_aten, f"{_FORWARD}_backward")
    dquery, dkey, dvalue = run(grad, *tensors, *results, 0.0, False, attn_mask=mask, scale=scale)
    return dquery, dkey, dvalue


@cache
def is_here() -> bool:
    """Whether both operators are, tried on one token."""
    one, mask = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    try:
        results = forward(one, one, one, mask, None)
        backward(one, (one, one, one), results, mask, None)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return True
