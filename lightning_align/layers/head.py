"""The output projection of a model, and what it does besides a matrix product."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

# What the config calls the numbers that a head applies to its logits (or, equally, to its input).
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, ...
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, MiniCPM3, ...
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, ...


@dataclass(frozen=True, eq=False)
class Head:
    """The output projection with everything it does besides the matrix product.

    Attributes:
        weight: Projection, (V, D).
        bias: Added to the product, (V,), or None.
        logit_scale: Factor on the logits.
        softcap: Bound ``c`` of ``c * tanh(logits / c)``, or None.
    """

    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(default=None, repr=False)
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D), in the dtype of the hidden states."""
        logits_NV = F.linear(hidden_ND, self.weight, self.bias)
        if self.logit_scale != 1.0:
            logits_NV = logits_NV * self.logit_scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV


def head_arithmetic(config: Any) -> tuple[float, float | None]:
    """Logit scale and softcap that a config asks for."""
    scale = math.prod(_numbers(config, _MULTIPLIERS).values())
    scale /= math.prod(_numbers(config, _DIVISORS).values())
    return scale, next(iter(_numbers(config, _SOFTCAPS).values()), None)


def logit_entries(config: Any) -> str:
    """Entries of a config that may explain what a model does to its logits."""
    words = ("logit", "softcap", "soft_cap", "lm_head", "multiplier", "scal")
    names = [name for name in getattr(config, "__dict__", {}) if any(w in name for w in words)]
    return ", ".join(f"{name}={value:g}" for name, value in _numbers(config, names).items())


def _numbers(config: Any, names: Iterable[str]) -> dict[str, float]:
    """Those entries of a config that are set to a number; 0 means off."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    values = {name: getattr(config, name, None) for name in names}
    return {n: float(v) for n, v in values.items() if isinstance(v, (int, float)) and v}
