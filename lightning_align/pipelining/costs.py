"""Times of the actions and messages of a schedule, as given or as measured in a real run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_align._errors import argument_error
from lightning_align.pipelining.actions import KINDS, Event, Schedule

Floats = NDArray[np.float64]
Cost = float | Sequence[float]
LARGEST = 1e100  # of a cost, in whatever unit: that sums and ratios are finite, too
RANGE = f"must be finite and not negative, and at most {LARGEST:g}"


def per_stage(cost: Cost, schedule: Schedule, where: str, argument: str) -> Floats:
    """One number for each stage, from one number or as many."""
    cost_S = as_costs(cost)
    if cost_S.ndim and cost_S.shape != (schedule.num_stages,):
        rule = f"must be one number, or one for each of the {schedule.num_stages} stages"
        raise argument_error(where, argument, cost, rule)
    if not ((cost_S >= 0) & (cost_S <= LARGEST)).all():
        raise argument_error(where, argument, cost, RANGE)
    return np.broadcast_to(cost_S, schedule.num_stages)


def as_costs(cost: Cost) -> Floats:
    """As an array; an integer that no float can be is infinite."""
    try:
        return np.asarray(cost, dtype=np.float64)
    except OverflowError:
        return np.full(np.shape(np.asarray(cost, dtype=object)), np.inf)


def action_costs(
    schedule: Schedule,
    forward_cost: Cost,
    backward_cost: Cost,
    weight_cost: Cost | None,
    where: str,
) -> Floats:
    """Time of each kind of action on each stage, (K, S)."""
    forward_S = per_stage(forward_cost, schedule, where, "forward_cost")
    backward_S = per_stage(backward_cost, schedule, where, "backward_cost")
    if not (forward_S + backward_S).any():
        raise argument_error(where, "forward_cost", forward_cost, "some stage must take time")
    weight_S = backward_S / 2
    if weight_cost is not None:
        weight_S = per_stage(weight_cost, schedule, where, "weight_cost")
        if (weight_S > backward_S).any():
            rule = "is a part of backward_cost and must not exceed it"
            raise argument_error(where, "weight_cost", weight_cost, rule)
    return np.stack([forward_S, backward_S, backward_S - weight_S, weight_S])  # as in KINDS


def message_times(
    schedule: Schedule,
    comm_latency: float,
    bandwidth: float | None,
    activation_bytes: Cost | None,
    where: str,
) -> Floats:
    """Time from one stage to the next on another rank, and back."""
    if not 0 <= comm_latency <= LARGEST:
        raise argument_error(where, "comm_latency", comm_latency, RANGE)
    if bandwidth is None:
        if activation_bytes is not None:
            rule, value = "counts only together with bandwidth", activation_bytes
            raise argument_error(where, "activation_bytes", value, rule)
        return np.full(schedule.num_stages, comm_latency)
    if activation_bytes is None:
        rule = "counts only together with activation_bytes"
        raise argument_error(where, "bandwidth", bandwidth, rule)
    if not bandwidth > 0:
        raise argument_error(where, "bandwidth", bandwidth, "must be positive")
    bytes_S = per_stage(activation_bytes, schedule, where, "activation_bytes")
    times_S = comm_latency + bytes_S / as_costs(bandwidth)
    if not (times_S <= LARGEST).all():
        rule = f"a message would take more than {LARGEST:g} units of time"
        raise argument_error(where, "bandwidth", bandwidth, rule)
    return times_S


def measured_costs(events: Iterable[Event]) -> dict[str, list[float]]:
    """The costs of each stage in a real run, by their medians, as arguments of ``simulate``.

    Args:
        events: Timeline of a real run, of every rank.

    Raises:
        ValueError: If a stage has no forward or no backward among them.
    """
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    for event in events:
        times[event.stage_index, event.action].append(event.end_s - event.start_s)
    costs: dict[str, list[float]] = {"forward_cost": [], "backward_cost": [], "weight_cost": []}
    for stage in range(1 + max((stage for stage, _ in times), default=0)):
        seconds = {
            kind: float(np.median(times[stage, kind])) if times[stage, kind] else 0.0
            for kind in KINDS
        }
        backward = seconds["B"] or seconds["I"] + seconds["W"]
        if not (seconds["F"] and backward):
            rule = f"stage {stage} has no forward or no backward among them"
            raise argument_error("measured_costs", "events", "...", rule, "Give those of all ranks")
        costs["forward_cost"].append(seconds["F"])
        costs["backward_cost"].append(backward)
        costs["weight_cost"].append(seconds["W"])
    if not any(costs["weight_cost"]):
        del costs["weight_cost"]  # nothing was put off
    return costs
