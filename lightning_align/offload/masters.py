"""Masters: fp32 values that the optimizer steps in the place of parameters of half precision.

An update is often smaller than half the distance of two neighbours in bf16, and is lost where it is
added to such a number. So the parameter's fp32 value is kept as one more tensor of its optimizer
state; it is stepped, with the gradient and the moments in fp32, too, and what forward and backward
compute with is its rounding (mixed precision training, arXiv:1710.03740, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

KEY = "master"  # of the optimizer's state


def lift(parameter: nn.Parameter, state: dict[str, Any]) -> None:
    """Let a parameter be its master; the first one is what it is in half precision.

    Args:
        parameter: Whose values are there.
        state: The optimizer's, of which the master is taken out.
    """
    master = state.pop(KEY, None)
    parameter.data = parameter.data.float() if master is None else master


def round_off(parameter: nn.Parameter, state: dict[str, Any], half: Tensor) -> None:
    """Let a parameter be the rounding of its master, which goes back into the state.

    Args:
        parameter: It is its master.
        state: The optimizer's.
        half: Where its values in half precision are.
    """
    state[KEY] = parameter.data
    half.copy_(parameter.data)
    parameter.data = half


def without_masters(states: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """States as the optimizer's class knows them."""
    return {n: {k: v for k, v in state.items() if k != KEY} for n, state in states.items()}


def outlines(
    states: dict[Any, dict[str, Any]], parameters: Mapping[Any, nn.Parameter]
) -> dict[Any, dict[str, Any]]:
    """The same states with shapes in the place of tensors: a cast of these is no whole model.

    Args:
        states: By number.
        parameters: Whose they are.
    """
    return {
        number: {key: _outline(value, parameters.get(number)) for key, value in state.items()}
        for number, state in states.items()
    }


def _outline(value: Any, parameter: nn.Parameter | None) -> Any:
    if not isinstance(value, Tensor) or value.numel() < 2 or parameter is None:
        return value
    dtype = parameter.dtype if value.is_floating_point() else value.dtype
    return torch.zeros((), dtype=dtype).expand(value.shape)


def put_back(states: dict[Any, dict[str, Any]], found: dict[Any, dict[str, Any]]) -> None:
    """Put tensors in the place of outlines, and of what ``load_state_dict`` has cast.

    Args:
        states: What was to be loaded, by number or parameter.
        found: What was loaded, by the same.
    """
    for key, state in states.items():
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        for name, value in tensors.items():
            known = found[key].get(name)
            if known is None or value.numel() > 1 or known.dtype != value.dtype:
                found[key][name] = value
