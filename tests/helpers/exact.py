"""Tolerances that no processor decides: from float64, and from the error that the other side makes.

A product of matrices adds up in another order on every kind of processor, and for every shape. What
is asked of ours is therefore not a number of digits but the other side's: computed from the same
inputs, it may be as far from the result in float64 as the other side is, times a small factor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FACTOR = 4.0  # between two orders of the same sum


def assert_as_exact_as(
    ours: Tensor, theirs: Tensor | Sequence[Tensor], exact: Tensor, factor: float = FACTOR
) -> None:
    """Our largest error is at most ``factor`` times theirs, or ``factor`` roundings of the result.

    Args:
        ours: What is tested.
        theirs: The other side's result in the same dtype; of several the worst counts.
        exact: The result in float64.
        factor: What another order of additions may add.
    """
    results = [theirs] if isinstance(theirs, Tensor) else theirs
    assert all(ours.shape == result.shape == exact.shape for result in results)
    assert all(ours.dtype == result.dtype for result in results)
    assert exact.dtype == torch.float64
    # What theirs hits by luck has one rounding of the largest entry all the same.
    rounding = torch.finfo(ours.dtype).eps * largest(exact)
    allowed = factor * max(rounding, *(largest(result - exact) for result in results))
    assert largest(ours - exact) <= allowed, f"{largest(ours - exact):.3g} where {allowed:.3g} is"


def assert_rounded_once(ours: Tensor, exact: Tensor) -> None:
    """Ours, in 16 bits, is the result in fp32 rounded once.

    Half a unit in the last place away from float64, and as much more as fp32 may be: 1e-5 of the
    largest entry, which can also make it round the other way.
    """
    unit = torch.finfo(ours.dtype).eps * exact.abs().clamp(min=torch.finfo(ours.dtype).tiny)
    assert ((ours.double() - exact).abs() <= unit / 2 + 1e-5 * exact.abs().max()).all()


def largest(values: Tensor) -> float:
    """The largest absolute value; 0 of nothing."""
    return float(values.detach().abs().max()) if values.numel() else 0.0


def in_float64(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Leaves with the same values, in float64."""
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def value_and_gradients(value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A scalar, and its gradients; multiplied by 0.3, so that what comes from above must arrive."""
    return [value.detach(), *torch.autograd.grad(0.3 * value, list(tensors))]
