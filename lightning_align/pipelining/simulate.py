"""How long a pipeline schedule takes, how much of it is waiting, and what each rank must remember.

An action starts when the one before it on its rank has ended and what it needs from another stage
has arrived: the activations of the stage before for a forward, the gradient of the stage after for
a backward. Messages travel while the ranks compute, as torch's runtime sends them, and links are
not shared. That is all: no kernel is modelled, so costs come from a measurement or a ratio.

Suffixes: N actions (those of rank 0 first), R ranks, S stages, K kinds of actions, M microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lightning_align._errors import argument_error
from lightning_align.pipelining.actions import KINDS, Action, B, Event, F, I, Ints, Schedule
from lightning_align.pipelining.costs import Cost, Floats, action_costs, message_times, per_stage
from lightning_align.pipelining.plot import draw_timeline, write_chrome_trace
from lightning_align.pipelining.schedule import build_schedule


@dataclass(frozen=True, eq=False)
class SimResult:
    """What ``simulate`` found. Times are in the unit of the costs."""

    schedule: Schedule
    step_time: float
    """From the first forward to the end of the last backward of any rank."""
    busy: list[float]
    """Time in which each rank computes."""
    peak_activations: list[float]
    """For each rank, the most microbatches whose activations it holds for the backward at once, in
    units of all its layers: on a rank of two stages, one stage's are half a unit."""
    peak_saved_bytes: list[float] | None
    """The same in bytes, if ``saved_bytes`` was given."""
    starts: Floats
    """Start of each action, rank by rank."""
    ends: Floats
    """End of each action."""

    @property
    def bubble_over_ideal(self) -> float:
        """Time beyond that of the busiest rank, over that time: (p - 1) / m for 1F1B."""
        return self.step_time / max(self.busy) - 1

    @property
    def own_bubble_over_ideal(self) -> float:
        """The same, if each rank's step lasts from its own first action to its own last one.

        So do zero-bubble schedules count, whose ranks do not wait for each other at the optimizer
        step (arXiv:2401.10241, Section 4). Clipping by a global norm makes them wait.
        """
        bounds = np.cumsum([0, *map(len, self.schedule.rows)])
        spans = self.ends[bounds[1:] - 1] - self.starts[bounds[:-1]]
        return float(np.max(spans)) / max(self.busy) - 1

    @cached_property
    def events(self) -> list[Event]:
        """When each action runs, rank by rank."""
        rows = enumerate(self.schedule.rows)
        places = [(rank, *row) for rank, rows_N3 in rows for row in rows_N3.tolist()]
        times = zip(self.starts.tolist(), self.ends.tolist(), strict=True)
        return [
            Event(rank, KINDS[kind], stage, microbatch, start, end)
            for (rank, stage, kind, microbatch), (start, end) in zip(places, times, strict=True)
        ]

    def to_png(
        self, path: str | Path, *, measured: Sequence[Event] | None = None, title: str | None = None
    ) -> None:
        """Draw the timeline, with that of a real run below each rank's if ``measured`` is given."""
        title = title or f"{self.schedule.name}: bubble {self.bubble_over_ideal:.1%} of ideal"
        draw_timeline(path, self.events, measured=measured, title=title)

    def to_chrome_trace(self, path: str | Path, *, measured: Sequence[Event] | None = None) -> None:
        """Write the timeline for Perfetto or chrome://tracing, and ``measured`` beside it."""
        write_chrome_trace(path, self.events, measured=measured)


def simulate(
    schedule: str | Schedule,
    pp: int | None = None,
    num_microbatches: int | None = None,
    num_stages_per_rank: int | None = None,
    *,
    forward_cost: Cost = 1.0,
    backward_cost: Cost = 2.0,
    weight_cost: Cost | None = None,
    comm_latency: float = 0.0,
    bandwidth: float | None = None,
    activation_bytes: Cost | None = None,
    saved_bytes: Cost | None = None,
    where: str = "simulate",
) -> SimResult:
    """Work out when every action of a pipeline schedule runs.

    Args:
        schedule: Name of a schedule, or one that was built or read from a file.
        pp: Pipeline ranks, for a name.
        num_microbatches: Microbatches of a step, for a name.
        num_stages_per_rank: Stages on each rank, for a name.
        forward_cost: Time of one stage for the forward of one microbatch; a number, or one for
            each stage. Seconds, or any other unit.
        backward_cost: Time of one stage for the whole backward of one microbatch.
        weight_cost: Part of ``backward_cost`` that is the gradient of the weights, which
            zero-bubble schedules put off; default, half of it.
        comm_latency: Time until a message has crossed to another rank, whatever its size.
        bandwidth: Bytes per unit of time between two ranks; None for no limit.
        activation_bytes: Bytes that leave a stage for the next with one microbatch, and come back
            as its gradient; a number, or one for each stage.
        saved_bytes: Bytes that a stage keeps for the backward of one microbatch; a number, or one
            for each stage.
        where: Class or function that the user called, for errors.

    Raises:
        ValueError: If an argument is out of range or ranks wait for each other in a circle; the
            message then names the actions that wait.
    """
    if isinstance(schedule, str):
        if pp is None or num_microbatches is None:
            missing = "pp" if pp is None else "num_microbatches"
            raise argument_error(where, missing, None, "must be given with a schedule's name")
        schedule = build_schedule(schedule, pp, num_microbatches, num_stages_per_rank, where=where)
    elif not (pp is num_microbatches is num_stages_per_rank is None):
        rule = "has its own numbers of ranks, stages and microbatches"
        raise argument_error(where, "schedule", schedule.name, rule, "Give no others")
    actions_N3 = np.concatenate(list(schedule.rows))
    cost_KS = action_costs(schedule, forward_cost, backward_cost, weight_cost, where)
    cost_N = cost_KS[actions_N3[:, 1], actions_N3[:, 0]]
    message_S = message_times(schedule, comm_latency, bandwidth, activation_bytes, where)
    needs_N, travel_N = _needs(schedule, actions_N3, message_S)
    start_N, end_N = _run(schedule, cost_N, needs_N, travel_N, where)
    ends_R = np.cumsum([*map(len, schedule.rows)])
    stages_R = np.bincount(schedule.stage_ranks, minlength=schedule.num_ranks)
    peak_bytes = None
    if saved_bytes is not None:
        saved_S = per_stage(saved_bytes, schedule, where, "saved_bytes")
        peak_bytes = _peaks(schedule, saved_S).tolist()
    return SimResult(
        schedule=schedule,
        step_time=float(end_N.max()),
        busy=[float(cost.sum()) for cost in np.split(cost_N, ends_R[:-1])],
        peak_activations=(_peaks(schedule, np.ones(schedule.num_stages)) / stages_R).tolist(),
        peak_saved_bytes=peak_bytes,
        starts=start_N,
        ends=end_N,
    )


def _needs(schedule: Schedule, actions_N3: Ints, message_S: Floats) -> tuple[Ints, Floats]:
    """The action of another stage that each action waits for, or -1, and its message's way."""
    stages, kinds, microbatches = actions_N3.T
    number_KSM = np.full((4, schedule.num_stages, schedule.num_microbatches), -1)
    number_KSM[kinds, stages, microbatches] = np.arange(len(actions_N3))
    needs_N = np.full(len(actions_N3), -1)
    travel_N = np.zeros(len(actions_N3))
    ranks_S = schedule.stage_ranks

    forward = (kinds == F) & (stages > 0)
    before, microbatch = stages[forward] - 1, microbatches[forward]
    needs_N[forward] = number_KSM[F, before, microbatch]
    travel_N[forward] = np.where(ranks_S[before] == ranks_S[before + 1], 0.0, message_S[before])

    # The last stage's own forward, and the I of a W, come earlier on the same rank.
    backward = ((kinds == B) | (kinds == I)) & (stages < schedule.num_stages - 1)
    here, microbatch = stages[backward], microbatches[backward]
    whole, half = (number_KSM[kind, here + 1, microbatch] for kind in (B, I))
    needs_N[backward] = np.maximum(whole, half)
    travel_N[backward] = np.where(ranks_S[here] == ranks_S[here + 1], 0.0, message_S[here])
    return needs_N, travel_N


def _run(
    schedule: Schedule, cost_N: Floats, needs_N: Ints, travel_N: Floats, where: str
) -> tuple[Floats, Floats]:
    """Start and end of each action.

    Each rank runs on until it needs an action that has not run, whose rank then wakes it: one
    visit for each action, in an order that needs no sorting. Lists, because this loop is in Python
    and reads one number at a time.
    """
    cost, needs, travel = cost_N.tolist(), needs_N.tolist(), travel_N.tolist()
    stop = np.cumsum([*map(len, schedule.rows)]).tolist()
    place = [0, *stop[:-1]]
    clock = [0.0] * len(stop)
    start, end = [0.0] * len(cost), [-1.0] * len(cost)  # -1: has not run
    waiting: dict[int, int] = {}  # action -> the rank that waits for it; no two wait for the same
    awake = list(range(len(stop)))
    while awake:
        rank = awake.pop()
        now = clock[rank]
        for action in range(place[rank], stop[rank]):
            needed = needs[action]
            if needed >= 0:
                arrival = end[needed]
                if arrival < 0:
                    waiting[needed] = rank
                    place[rank] = action
                    break
                arrival += travel[action]
                now = max(now, arrival)
            start[action] = now
            now += cost[action]
            end[action] = now
            if action in waiting:
                awake.append(waiting.pop(action))
        else:
            place[rank] = stop[rank]
        clock[rank] = now
    if waiting:
        raise _deadlock(schedule, waiting, place, where)
    return np.array(start), np.array(end)


def _deadlock(
    schedule: Schedule, waiting: dict[int, int], place: list[int], where: str
) -> ValueError:
    actions_N3 = np.concatenate(list(schedule.rows))

    def name(number: int) -> str:
        stage, kind, microbatch = actions_N3[number].tolist()
        return str(Action(stage, KINDS[kind], microbatch))

    blocked = [
        f"rank {rank} stops before {name(place[rank])}, which needs {name(needed)} of rank "
        f"{schedule.stage_ranks[actions_N3[needed, 0]]}"
        for needed, rank in sorted(waiting.items(), key=lambda item: item[1])
    ]
    shown = "; ".join(blocked[:8]) + (f"; and {len(blocked) - 8} more" if len(blocked) > 8 else "")
    rule = f"ranks wait for each other: {shown}"
    return argument_error(where, "schedule", schedule.name, rule)


def _peaks(schedule: Schedule, saved_S: Floats) -> Floats:
    """The most that each rank holds for the backward at once; W lets go of what I still needs."""
    peaks = []
    for rows_N3 in schedule.rows:
        saved_N = saved_S[rows_N3[:, 0]]
        kinds = rows_N3[:, 1]
        changes_N = np.where(kinds == F, saved_N, np.where(kinds == I, 0.0, -saved_N))
        peaks.append(changes_N.cumsum().max(initial=0.0))
    return np.array(peaks)
