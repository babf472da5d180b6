"""Bytes of optimizer state, as the optimizers themselves make it: for parameters on meta."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_align.optimizers import galore_groups, muon, stable_adamw
from lightning_align.optimizers.adamw import init_adamw_state, moment_dtype
from lightning_align.optimizers.param_groups import GROUPS
from lightning_align.planner.model_spec import Shapes
from lightning_align.planner.parallel_spec import ParallelSpec

_DTYPES = {2: torch.bfloat16, 4: torch.float32}


def _galore(group: Mapping[str, Any], parameter: Tensor, rank: int) -> Mapping[str, torch.Size]:
    is_matrix = bool(group["use_muon"])
    own = {"rank": rank, "rank_is_asked_for": True, "proj_type": "std"} if is_matrix else {}
    return galore_groups.state_shapes({"rank": None, **own}, parameter)


def _adamw(_: Mapping[str, Any], parameter: Tensor, __: int) -> Mapping[str, torch.Size]:
    return {name: value.shape for name, value in init_adamw_state(parameter).items()}


# Optimizer -> the tensors that it keeps for a parameter of a group, and GaLore's rank.
_STATES: dict[str, Callable[[Mapping[str, Any], Tensor, int], Mapping[str, torch.Size]]] = {
    "adamw": _adamw,
    "stable_adamw": lambda group, parameter, _: stable_adamw.state_shapes(dict(group), parameter),
    "muon": lambda group, parameter, _: muon.state_shapes(dict(group), parameter),
    "galore_adamw": _galore,
    "sgd": lambda *_: {},
}


def _state_dtype(optimizer: str, parameter: Tensor) -> torch.dtype:
    """That of torch's AdamW is the parameter's; ours have fp32 for 16 bits."""
    return parameter.dtype if optimizer == "adamw" else moment_dtype(parameter)


@lru_cache(maxsize=4096)
def _bytes_of(optimizer: str, kind: str, shape: tuple[int, ...], rank: int, width: int) -> int:
    parameter = torch.empty(shape, dtype=_DTYPES[width], device="meta")
    shapes = _STATES[optimizer](GROUPS[kind], parameter, rank)
    size = _state_dtype(optimizer, parameter).itemsize
    return sum(4 if name == "step" else size * shape.numel() for name, shape in shapes.items())


def state_bytes(shapes: Shapes, parallel: ParallelSpec) -> int:
    """Bytes of optimizer state of some parameters, undivided.

    Args:
        shapes: Kind and shape of each.
        parallel: The optimizer, and the precision of the parameters; with fp32 weights in the
            optimizer, these are counted.
    """
    rank, width = parallel.galore_rank, parallel.weight_bytes
    if parallel.has_masters:
        own = [_bytes_of(parallel.optimizer, kind, shape, rank, 4) for kind, shape in shapes]
        return sum(own) + 4 * sum(prod(shape) for _, shape in shapes)
    return sum(_bytes_of(parallel.optimizer, kind, shape, rank, width) for kind, shape in shapes)
