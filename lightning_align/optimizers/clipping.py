"""Clipping that follows the run: by the history of the gradient norm, and by unit of a weight.

A fixed limit on the norm is too high late in a run or too low early on. ZClip takes the limit from
the norm's own mean and spread; adaptive gradient clipping (AGC) from the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align._errors import check_least
from lightning_align.layers import ModelLayers
from lightning_align.optimizers.param_groups import parameter_kinds
from lightning_align.optimizers.safety import check_number

# ZClip


def zclip(norm: float, mean: float, std: float, z_thres: float) -> float:
    """The norm that a gradient is clipped to; its own, unless that is an outlier.

    The further out, the shorter it becomes: mu + z_thres^2 / z * sigma (arXiv:2504.02507,
    reciprocal clipping, the paper's default).

    Args:
        norm: Of the gradient.
        mean: Of earlier norms.
        std: Their standard deviation.
        z_thres: How many of these above the mean is an outlier.
    """
    z = (norm - mean) / (std + 1e-6)  # 1e-6 as in the authors' code
    return mean + z_thres * std / (z / z_thres) if z > z_thres else norm


class ZClip:
    """Limits of the gradient norm from its moving mean and variance (arXiv:2504.02507).

    Args:
        alpha: Decay of mean and variance in a step.
        z_thres: Standard deviations above the mean from which on a norm is clipped.
        warmup_steps: Steps whose norms mean and variance begin with; none of them is clipped.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> limits = ZClip(warmup_steps=2)
        >>> [round(limits.update(norm), 2) for norm in (1.0, 1.2, 1.1, 50.0)]
        [1.0, 1.2, 1.1, 1.1]
    """

    def __init__(self, alpha: float = 0.97, z_thres: float = 2.5, warmup_steps: int = 25) -> None:
        check_number("ZClip", "alpha", alpha, high=1.0)
        check_number("ZClip", "z_thres", z_thres, above_low=True)
        check_least("ZClip", 1, warmup_steps=warmup_steps)
        self.alpha, self.z_thres, self.warmup_steps = alpha, z_thres, warmup_steps
        self._first: list[float] = []
        self._mean, self._variance = 0.0, 0.0

    def limit(self, norm: float) -> float:
        """The norm that a gradient of this norm is clipped to."""
        if len(self._first) < self.warmup_steps or not math.isfinite(norm):
            return norm
        return zclip(norm, self._mean, math.sqrt(self._variance), self.z_thres)

    def update(self, norm: float) -> float:
        """The same, and from here on the norm it is clipped to is a part of mean and variance.

        A norm that is not finite is no part of them.
        """
        limit = self.limit(norm)
        if not math.isfinite(norm):
            return limit
        if len(self._first) < self.warmup_steps:
            self._first.append(norm)
            count = len(self._first)
            self._mean = sum(self._first) / count
            self._variance = sum((each - self._mean) ** 2 for each in self._first) / count
        else:
            self._mean = self.alpha * self._mean + (1 - self.alpha) * limit
            deviation = (limit - self._mean) ** 2  # from the new mean, as in the authors' code
            self._variance = self.alpha * self._variance + (1 - self.alpha) * deviation
        return limit

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"first": list(self._first), "mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._first = list(state_dict["first"])
        self._mean, self._variance = state_dict["mean"], state_dict["variance"]


# AGC


def units(
    module: nn.Module, layers: ModelLayers | None = None
) -> dict[nn.Parameter, tuple[int, ...]]:
    """The parameters that AGC clips, and over which dimensions the norm of a unit goes.

    A unit is what makes one output: a row of a matrix, a column where it is stored (in, out), a
    filter; of norms and biases it is all of it. Head and embeddings are left out, as their rows
    belong to tokens of which a batch has a few (for the head: arXiv:2102.06171, section 4).

    Args:
        module: Whose parameters they are.
        layers: Map of its language model, where it is known.
    """
    dims: dict[nn.Parameter, tuple[int, ...]] = {}
    for parameter, kind in parameter_kinds(module, layers).items():
        if kind in ("head", "embeddings"):
            continue
        if parameter.ndim < 2:
            dims[parameter] = tuple(range(parameter.ndim))
        else:
            output = 1 if kind == "matrices_transposed" else 0
            dims[parameter] = tuple(d for d in range(parameter.ndim) if d != output)
    return dims


@torch.no_grad()
def clip_units_(
    parameters: Iterable[tuple[Tensor, tuple[int, ...]]], clipping: float, *, eps: float = 1e-3
) -> None:
    """Clip gradients by unit, in place (AGC, Brock et al., arXiv:2102.06171, Eq. 3).

    G <- clipping * max(|W|, eps) / |G| * G  where |G| > clipping * max(|W|, eps), unit by unit.

    Args:
        parameters: With the dimensions of a unit, as ``units`` has them; those without a gradient
            are left out.
        clipping: Largest ratio of a unit's gradient norm to its weight norm, lambda in the paper.
        eps: Weight norm that a unit has at least, so that one of zeros can learn.

    Raises:
        ValueError: If ``clipping`` or ``eps`` is not above 0.
    """
    check_number("clip_units_", "clipping", clipping, above_low=True)
    check_number("clip_units_", "eps", eps, above_low=True)
    for weight, dims in parameters:
        if weight.grad is None:
            continue
        largest = clipping * _norm(weight, dims).clamp(min=eps)
        norm = _norm(weight.grad, dims)
        # Where it is not above the limit the factor is 1, to the bit.
        weight.grad.mul_(torch.where(norm > largest, largest / norm, torch.ones_like(norm)))


def _norm(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    if not dims:  # a scalar
        return values.detach().abs()
    norm: Tensor = torch.linalg.vector_norm(values.detach(), dim=dims, keepdim=True)
    return norm
