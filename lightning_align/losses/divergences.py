"""f-DPO's reward of a completion, for each f-divergence between policy and reference.

Under a penalty of beta times an f-divergence, the optimal policy has the reward beta f'(u), with u
the ratio of its probability to the reference's, up to a constant of the prompt (Wang et al.,
arXiv:2309.16240, Theorem 1): the constant cancels in the difference of a pair, and in nothing else.
Here is f'(u) from log u; u itself would overflow.

Shapes: P completions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def reverse_kl(logratios_P: Tensor, _alpha: float) -> Tensor:
    """DPO: f(u) = u log u, f'(u) = log u + 1, where the 1 cancels."""
    return logratios_P


def forward_kl(logratios_P: Tensor, _alpha: float) -> Tensor:
    """f(u) = -log u, f'(u) = -1/u. The constant 1 before it, as in TRL, cancels."""
    return -bounded_expm1(-logratios_P)


def js_divergence(logratios_P: Tensor, _alpha: float) -> Tensor:
    """f'(u) = log(2 u / (1 + u)): at most log 2, however likely a completion becomes."""
    return math.log(2) + F.logsigmoid(logratios_P)


def alpha_divergence(logratios_P: Tensor, alpha: float) -> Tensor:
    """f'(u) = (u^(alpha - 1) - 1) / (alpha - 1), which tends to log u as alpha does to 1.

    With TRL's alpha; that of the paper's Table 1 is 1 - alpha.
    """
    power = alpha - 1
    if abs(power) < 1e-6:
        return reverse_kl(logratios_P, alpha)
    return bounded_expm1(power * logratios_P) / power


def bounded_expm1(exponents: Tensor) -> Tensor:
    """exp(x) - 1 that never becomes infinite, for the difference of two infinities is nan.

    From e^80 on, which is not far from the end of fp32, it is a constant, as in TRL.

    Args:
        exponents: x, of any shape.
    """
    largest = {torch.float64: 700.0, torch.float16: 11.0}.get(exponents.dtype, 80.0)
    return torch.expm1(exponents.clamp(max=largest))


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
