"""Seconds of an operation by how much it has to do: a curve for each class of operations."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TypeAlias

from lightning_align.planner.op_flops import ATTENTION, NORM, POINTWISE, PRODUCT, REDUCTION, words
from lightning_align.planner.records import Record

# Work of a call (FLOPs of products, bytes of all else) and its seconds, by growing work.
Curve: TypeAlias = Sequence[tuple[float, float]]
FUNCTIONS = "functions"  # pointwise operations that compute an exponential, a root or the like
TANH = "tanh"  # and what takes as long
MOVE = "move"
_FUNCTIONS = words(
    """
    gelu gelu_backward silu silu_backward exp sigmoid log logsumexp softplus mish
    log_sigmoid_forward sqrt rsqrt
    """
)
_TANH = words("tanh erf sin cos atan2 asin acos lgamma digamma")
_CLASSES = (ATTENTION, NORM, POINTWISE, PRODUCT, REDUCTION)


def class_of(record: Record) -> str:
    """Class of an operation, whose members take about as long for the same work."""
    return _class_of(record.name, record.kind)


@cache  # of some hundred names
def _class_of(name: str, kind: str) -> str:
    base = name.rpartition(".")[2].rstrip("_").removeprefix("_foreach_")
    if kind == POINTWISE and base in _FUNCTIONS | _TANH:
        return FUNCTIONS if base in _FUNCTIONS else TANH
    if kind in (ATTENTION, NORM) and "backward" in base:
        return f"{kind} backward"
    return kind if kind in _CLASSES else MOVE


def work_of(record: Record, softmax: Mapping[str, float]) -> float:
    """How much an operation has to do: FLOPs of products, bytes of all else.

    Args:
        record: The operation.
        softmax: Class of attention -> FLOPs of products that take as long as one of its softmax.
    """
    if record.kind == ATTENTION:
        return record.flops + softmax.get(class_of(record), 0.0) * record.pointwise_flops
    return record.flops or record.bytes


def interpolated(curve: Curve, work: float) -> float:
    """Seconds of some work: between two points a power law, outside at the speed of the last one.

    Args:
        curve: Points, by growing work.
        work: Not negative.
    """
    first_work, first_s = curve[0]
    last_work, last_s = curve[-1]
    if work <= first_work:
        return first_s  # what little there is to do is not what it costs
    if work >= last_work:
        return last_s * work / last_work
    place = bisect_left(curve, work, key=lambda point: point[0])
    (low, low_s), (high, high_s) = curve[place - 1], curve[place]
    slope = math.log(high_s / low_s) / math.log(high / low)
    return float(low_s * (work / low) ** slope)
