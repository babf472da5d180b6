"""Where to cut a chain of layers into pipeline stages.

A pipeline is as fast as its slowest stage, so the largest stage is made as small as it can be, by
an exact dynamic programme instead of a greedy walk. Several cuts often share that optimum, because
an embedding or a head alone fills a stage; among them the most even one is taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_align._errors import argument_error
from lightning_align.pipelining.costs import as_costs

Floats = NDArray[np.float64]
METHODS = "'parameters', 'uniform', 'profile', 'type:<regex>' or the number of layers of each stage"


def partition(
    costs: Sequence[float],
    num_stages: int,
    partition_method: str | Sequence[int] = "parameters",
    *,
    type_names: Sequence[str] | None = None,
    first_cost: float = 0.0,
    last_cost: float = 0.0,
    where: str = "partition",
    stages_argument: str = "num_stages",
) -> list[tuple[int, int]]:
    """Cut a chain of layers into contiguous stages whose largest cost is as small as possible.

    Ties go to the cut with the smallest sum of squares, then to the one with fewer layers on the
    earlier stages, which keep the activations of more microbatches.

    Args:
        costs: Cost of each layer, in any unit: parameters, or the seconds of a profile.
        num_stages: Stages to make, over all ranks.
        partition_method: ``"parameters"`` or ``"profile"`` balance ``costs``; ``"uniform"`` the
            number of layers; ``"type:<regex>"`` the number of layers whose class name matches;
            a list is the number of layers of each stage.
        type_names: Class name of each layer, for ``"type:<regex>"``.
        first_cost: What rides on the first stage besides its layers, such as the embeddings.
        last_cost: What rides on the last stage besides its layers, such as the head.
        where: Class or function that the user called, for errors.
        stages_argument: Argument of ``where`` that set ``num_stages``, for errors.

    Returns:
        ``(begin, end)`` of each stage: it holds the layers ``begin`` to ``end - 1``.

    Raises:
        ValueError: If there are fewer layers than stages, a cost is negative or not finite, or the
            method is not one of those above or does not fit the layers.
    """
    num_layers = len(costs)
    if num_stages < 1:
        raise argument_error(where, stages_argument, num_stages, "must be at least 1")
    if num_layers < num_stages:
        rule = f"{num_stages} stages need a layer each, and the chain has {num_layers}"
        way_out = "Use fewer ranks or stages per rank"
        raise argument_error(where, stages_argument, num_stages, rule, way_out)
    if not isinstance(partition_method, str):
        return _given(partition_method, num_layers, num_stages, where)
    weights_L = as_costs(costs)
    if partition_method == "uniform":
        weights_L, first_cost, last_cost = np.ones(num_layers), 0.0, 0.0
    elif partition_method.startswith("type:"):
        weights_L = _matches(partition_method, type_names, num_layers, num_stages, where)
        first_cost = last_cost = 0.0
    elif partition_method not in ("parameters", "profile"):
        raise argument_error(where, "partition_method", partition_method, f"must be {METHODS}")
    weights = as_costs([*weights_L.tolist(), first_cost, last_cost])
    if not (np.isfinite(weights).all() and weights.min() >= 0):
        raise argument_error(where, "costs", list(costs), "must be finite and not negative")
    # By a power of two, which rounds nothing: that squares of 1e200 and of 1e-200 are numbers.
    *_, first, last = weights = np.ldexp(weights, -np.frexp(weights.max())[1])
    return _balanced(weights[:-2], num_stages, float(first), float(last))


def _given(
    num_layers_of_stages: Sequence[int], num_layers: int, num_stages: int, where: str
) -> list[tuple[int, int]]:
    counts = [int(count) for count in num_layers_of_stages]
    if len(counts) != num_stages or sum(counts) != num_layers or min(counts) < 1:
        rule = f"must be {num_stages} numbers of layers, each at least 1, with the sum {num_layers}"
        raise argument_error(where, "partition_method", list(num_layers_of_stages), rule)
    ends = np.cumsum(counts).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _matches(
    method: str, type_names: Sequence[str] | None, num_layers: int, num_stages: int, where: str
) -> Floats:
    """1 for each layer whose class name matches, ignoring case as DeepSpeed does, 0 for others."""
    if type_names is None or len(type_names) != num_layers:
        rule = f"needs the class names of the {num_layers} layers"
        raise argument_error(where, "partition_method", method, rule, "Give type_names")
    try:
        pattern = re.compile(method.removeprefix("type:"), re.IGNORECASE)
    except re.error as error:
        rule = f"is not a regular expression ({error})"
        raise argument_error(where, "partition_method", method, rule) from error
    matches_L = np.array([float(pattern.search(name) is not None) for name in type_names])
    if matches_L.sum() < num_stages:
        known = ", ".join(sorted(set(type_names)))
        rule = f"matches {matches_L.sum():.0f} layers of {num_layers}, for {num_stages} stages"
        raise argument_error(where, "partition_method", method, rule, f"The layers are {known}")
    return matches_L


def _balanced(
    weights_L: Floats, num_stages: int, first_cost: float, last_cost: float
) -> list[tuple[int, int]]:
    num_layers = len(weights_L)
    sums = np.concatenate([[0.0], np.cumsum(weights_L)])
    cost_BE = sums[None, :] - sums[:, None]  # cost of a stage from layer B to layer E - 1
    cost_BE[0, :] += first_cost
    cost_BE[:, num_layers] += last_cost
    cost_BE[np.tril_indices(num_layers + 1)] = np.inf  # no stage is empty
    largest, _ = _chain(cost_BE, num_stages, np.maximum)
    allowed_BE = np.where(cost_BE <= largest, cost_BE**2, np.inf)
    _, begins_SE = _chain(allowed_BE, num_stages, np.add)
    stages, end = [], num_layers
    for begins_E in reversed(begins_SE):
        begin = int(begins_E[end])
        stages.append((begin, end))
        end = begin
    return stages[::-1]


def _chain(
    cost_BE: Floats, num_stages: int, combine: np.ufunc
) -> tuple[float, list[NDArray[np.intp]]]:
    """The least combined cost of ``num_stages`` stages in a row, and where each begins.

    ``best_E[end]`` is the least cost of the stages so far over the layers before ``end``.
    """
    best_E = np.full(len(cost_BE), np.inf)
    best_E[0] = 0.0
    begins_SE = []
    for _ in range(num_stages):
        total_BE = combine(best_E[:, None], cost_BE)
        begins_E = total_BE.argmin(axis=0)  # the first: fewer layers on the earlier stages
        begins_SE.append(begins_E)
        best_E = np.take_along_axis(total_BE, begins_E[None], axis=0)[0]
    return float(best_E[-1]), begins_SE


def partition_table(
    stages: Sequence[tuple[int, int]],
    costs: Sequence[float],
    *,
    first_cost: float = 0.0,
    last_cost: float = 0.0,
    num_ranks: int | None = None,
    unit: str = "parameters",
) -> str:
    """The partition as text: a line for each stage with its rank, layers, cost and share.

    Args:
        stages: What ``partition`` returned.
        costs: Cost of each layer.
        first_cost: What rides on the first stage besides its layers.
        last_cost: What rides on the last stage besides its layers.
        num_ranks: Ranks the stages go round (stage s is on rank s modulo this); default, a rank
            for each stage.
        unit: Head of the column of costs.
    """
    num_ranks = num_ranks or len(stages)
    totals = [float(sum(costs[begin:end])) for begin, end in stages]
    totals[0] += first_cost
    totals[-1] += last_cost
    whole = sum(totals) or 1.0
    rows = [("stage", "rank", "layers", unit, "share")]
    for stage, ((begin, end), total) in enumerate(zip(stages, totals, strict=True)):
        layers = str(begin) if end == begin + 1 else f"{begin}-{end - 1}"
        layers = f"embeddings, {layers}" if stage == 0 and first_cost else layers
        layers = f"{layers}, head" if stage == len(stages) - 1 and last_cost else layers
        cost = f"{total:,.0f}" if total == int(total) else f"{total:.4g}"
        rows.append((str(stage), str(stage % num_ranks), layers, cost, f"{total / whole:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Numbers to the right, the layers to the left.
    sides = (str.rjust, str.rjust, str.ljust, str.rjust, str.rjust)
    lines = (zip(sides, row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(side(cell, width) for side, cell, width in line) for line in lines)
