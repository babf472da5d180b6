"""Which stage runs which microbatch when: pipeline schedules as lists of actions, one per rank.

    rank 0   F0 F1 F2       B0 F3 B1 ...     1F1B on 3 ranks: forwards until the first backward
    rank 1      F0 F1    B0 F2 B1 F3 ...     comes back, then one forward and one backward in
    rank 2         F0 B0 F1 B1 F2 B2 ...     turn, then the backwards that are left

Only the order is fixed here. When an action starts follows from what it waits for, which
``simulate`` works out and ``strategies/pipeline`` finds out. GPipe, 1F1B, interleaved 1F1B and
breadth-first differ in nothing but the order of the forwards, that of the backwards and how many
forwards come first. The zero-bubble schedules are taken from torch, which runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from lightning_align._errors import argument_error
from lightning_align.pipelining.actions import KINDS, B, F, Ints, Rows, Schedule


def build_schedule(
    schedule: str,
    pp: int,
    num_microbatches: int,
    num_stages_per_rank: int | None = None,
    *,
    where: str = "build_schedule",
) -> Schedule:
    """Make a schedule by its name in torch, in any case.

    Args:
        schedule: ``GPipe``, ``1F1B``, ``Interleaved1F1B``, ``LoopedBFS``,
            ``InterleavedZeroBubble``, ``ZBVZeroBubble`` or ``DualPipeV``.
        pp: Pipeline ranks.
        num_microbatches: Microbatches of a step.
        num_stages_per_rank: Stages on each rank; default 1 for GPipe and 1F1B, 2 for the others.
        where: Class or function that the user called, for errors.

    Raises:
        ValueError: If the schedule is unknown or cannot have these numbers.
    """
    names = {name.lower(): name for name in SCHEDULES}
    if schedule.lower() not in names:
        rule = f"must be one of {', '.join(names.values())}"
        raise argument_error(where, "schedule", schedule, rule)
    name = names[schedule.lower()]
    if num_stages_per_rank is None:
        num_stages_per_rank = 1 if name in _SINGLE else 2
    check_numbers(name, pp, num_microbatches, num_stages_per_rank, where)
    rows = [SCHEDULES[name](rank, pp, num_microbatches, num_stages_per_rank) for rank in range(pp)]
    return Schedule(name, pp * num_stages_per_rank, num_microbatches, rows)


def check_numbers(name: str, pp: int, m: int, v: int, where: str) -> None:
    """Refuse a schedule that cannot have these numbers.

    Args:
        name: Of the schedule, as torch writes it.
        pp: Pipeline ranks.
        m: Microbatches of a step.
        v: Stages on each rank.
        where: Class or function that the user called.

    Raises:
        ValueError: If it cannot.
    """
    for argument, value in (("pp", pp), ("num_microbatches", m), ("num_stages_per_rank", v)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise argument_error(where, argument, value, "must be an integer of at least 1")
    if name in _SINGLE and v > 1:
        rule, way_out = f"{name} has one stage on each rank", f"Use {_SINGLE[name]}"
        raise argument_error(where, "num_stages_per_rank", v, rule, way_out)
    if name == "Interleaved1F1B" and v == 1:
        rule = f"{name} interleaves two stages or more on each rank"
        raise argument_error(where, "num_stages_per_rank", v, rule, "Use 1F1B")
    if name in ("ZBVZeroBubble", "DualPipeV") and v != 2:
        rule = f"{name} has two stages on each rank, the two arms of a V"
        raise argument_error(where, "num_stages_per_rank", v, rule)
    if name == "DualPipeV" and m < 2 * pp:
        rule = f"{name} needs as many microbatches as stages, {2 * pp}"
        raise argument_error(where, "num_microbatches", m, rule)
    rounds = max(1, m // pp)
    if name.startswith("Interleaved") and m % rounds:
        rule = f"{name} runs {rounds} rounds of equally many microbatches on {pp} ranks"
        way_out = f"Use {m - m % rounds} or {m - m % pp + pp}"
        raise argument_error(where, "num_microbatches", m, rule, way_out)


def _rows(stages: Ints, kind: int, microbatches: Ints) -> Rows:
    stages, microbatches = np.broadcast_arrays(stages, microbatches)
    return np.stack([stages, np.full_like(stages, kind), microbatches], axis=-1).reshape(-1, 3)


def _in_turn(forwards_N3: Rows, backwards_N3: Rows, warmup: int) -> Rows:
    """``warmup`` forwards, then a forward and a backward in turn, then the backwards left."""
    turns = len(forwards_N3) - warmup
    pairs = np.stack([forwards_N3[warmup:], backwards_N3[:turns]], axis=1).reshape(-1, 3)
    return np.concatenate([forwards_N3[:warmup], pairs, backwards_N3[turns:]])


def _gpipe(rank: int, pp: int, m: int, v: int) -> Rows:
    """All forwards, then all backwards (arXiv:1811.06965, Figure 2c)."""
    del pp, v
    stages, microbatches = np.array([rank]), np.arange(m)
    return _in_turn(_rows(stages, F, microbatches), _rows(stages, B, microbatches), m)


def _one_forward_one_backward(rank: int, pp: int, m: int, v: int) -> Rows:
    """No more microbatches in flight than ranks to come (arXiv:2104.04473, Figure 4, above)."""
    del v
    stages, microbatches = np.array([rank]), np.arange(m)
    forwards_N3, backwards_N3 = _rows(stages, F, microbatches), _rows(stages, B, microbatches)
    return _in_turn(forwards_N3, backwards_N3, min(pp - 1 - rank, m))


def _interleaved(rank: int, pp: int, m: int, v: int) -> Rows:
    """1F1B on v stages a rank: a round of microbatches for each in turn (Figure 4, below)."""
    rounds = max(1, m // pp)
    per_round = m // rounds
    # Axes: round, stage of this rank, microbatch of the round.
    stages = (np.arange(v) * pp + rank)[None, :, None]
    microbatches = (np.arange(rounds) * per_round)[:, None, None] + np.arange(per_round)
    forwards_N3 = _rows(stages, F, microbatches)
    backwards_N3 = _rows(stages[:, ::-1], B, microbatches)
    warmup = (v - 1) * per_round + 2 * (pp - 1 - rank)
    return _in_turn(forwards_N3, backwards_N3, min(warmup, m * v))


def _breadth_first(rank: int, pp: int, m: int, v: int) -> Rows:
    """All microbatches for one stage of the rank after the other (arXiv:2211.05953)."""
    stages, microbatches = (np.arange(v) * pp + rank)[:, None], np.arange(m)
    backwards_N3 = _rows(stages[::-1], B, microbatches[::-1])
    return _in_turn(_rows(stages, F, microbatches), backwards_N3, m * v)


def _torch(name: str, rank: int, pp: int, m: int, v: int) -> Rows:
    # Here, because torch takes a second.
    from lightning_align._compat.torch_pipelining import torch_pipeline_rank

    triples = [
        (a.stage_index, KINDS.index(a.computation_type.value), a.microbatch_index)
        for a in torch_pipeline_rank(name, rank, pp, m, v)
    ]
    return np.array(triples, dtype=np.int64).reshape(-1, 3)


# Name in torch -> the actions of (rank, ranks, microbatches, stages on each rank).
SCHEDULES: dict[str, Callable[[int, int, int, int], Rows]] = {
    "GPipe": _gpipe,
    "1F1B": _one_forward_one_backward,
    "Interleaved1F1B": _interleaved,
    "LoopedBFS": _breadth_first,
    "InterleavedZeroBubble": partial(_torch, "InterleavedZeroBubble"),  # ZB-H1 of arXiv:2401.10241
    "ZBVZeroBubble": partial(_torch, "ZBVZeroBubble"),  # arXiv:2405.15362
    "DualPipeV": partial(_torch, "DualPipeV"),
}
# A schedule of one stage on each rank -> its like for more.
_SINGLE = {"GPipe": "LoopedBFS", "1F1B": "Interleaved1F1B"}
