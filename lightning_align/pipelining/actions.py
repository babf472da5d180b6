"""What a schedule consists of: actions in order, one list per rank, and the rules of that order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_align._errors import argument_error

Ints = NDArray[np.int64]
Rows = Ints  # (actions, 3): stage, kind (a place in KINDS), microbatch; suffix _N3

KINDS = "FBIW"  # forward, backward, backward for the input only, backward for the weights only
F, B, I, W = range(4)
_ACTION = re.compile(rf"(\d{{1,9}})([{KINDS}])(\d{{1,9}})")


class Action(NamedTuple):
    """One stage does one thing with one microbatch; written as torch does, ``2F0``."""

    stage_index: int
    kind: str
    microbatch_index: int

    def __str__(self) -> str:
        return f"{self.stage_index}{self.kind}{self.microbatch_index}"

    @classmethod
    def parse(cls, text: str) -> Action | None:
        """Read ``2F0``; None if it is not an action of this form."""
        match = _ACTION.fullmatch(text)
        return cls(int(match[1]), match[2], int(match[3])) if match else None


class Event(NamedTuple):
    """When an action ran, or would have run."""

    rank: int
    action: str
    """One of ``KINDS``."""
    stage_index: int
    microbatch_index: int
    start_s: float
    end_s: float


@dataclass(frozen=True, eq=False)
class Schedule:
    """The actions of every rank, in order. One that exists is complete and in a possible order.

    Args:
        name: For messages and pictures.
        num_stages: Stages of the model, over all ranks.
        num_microbatches: Microbatches of a step.
        rows: For each rank an array (actions, 3) of stage, kind and microbatch.

    Raises:
        ValueError: If an action is missing, repeated or out of order, or a stage is on two ranks.
    """

    name: str
    num_stages: int
    num_microbatches: int
    rows: Sequence[Rows]

    def __post_init__(self) -> None:
        if fault := find_fault(self.rows, self.num_stages, self.num_microbatches):
            raise argument_error("Schedule", "rows", self.name, fault)

    @property
    def num_ranks(self) -> int:
        """Number of pipeline ranks, one for each row."""
        return len(self.rows)

    @cached_property
    def stage_ranks(self) -> Ints:
        """The rank of each stage."""
        ranks_S = np.zeros(self.num_stages, dtype=np.int64)
        for rank, rows_N3 in enumerate(self.rows):
            ranks_S[rows_N3[:, 0]] = rank
        return ranks_S

    def actions(self, rank: int) -> list[Action]:
        """The actions of a rank, in order."""
        return [Action(stage, KINDS[kind], mb) for stage, kind, mb in self.rows[rank].tolist()]


def find_fault(rows: Sequence[Rows], num_stages: int, num_microbatches: int) -> str:
    """What is wrong with the order of actions, or an empty string.

    Each stage is on one rank and does each microbatch once: a forward, later a backward, whole or
    first for the input and later for the weights.
    """
    num_actions = sum(map(len, rows))
    if num_stages * num_microbatches > num_actions:  # a number with a digit too many, perhaps
        size = f"{num_stages} stages and {num_microbatches} microbatches"
        return f"{num_actions} actions are too few for {size}"
    places = np.full((4, num_stages, num_microbatches), -1)  # where in its row an action stands
    ranks_S = np.full(num_stages, -1)
    for rank, rows_N3 in enumerate(rows):
        if not len(rows_N3):
            return f"rank {rank} (row {rank + 1}) has no actions"
        stages, kinds, microbatches = rows_N3.T
        outside = (stages >= num_stages) | (microbatches >= num_microbatches) | (rows_N3 < 0).any(1)
        if outside.any():
            place = int(outside.argmax())
            size = f"{num_stages} stages and {num_microbatches} microbatches"
            return f"{_at(rank, rows_N3, place)}, of {size}"
        elsewhere = (ranks_S[stages] >= 0) & (ranks_S[stages] != rank)
        if elsewhere.any():
            place = int(elsewhere.argmax())
            other = ranks_S[stages[place]]
            return f"{_at(rank, rows_N3, place)}, and stage {stages[place]} is on rank {other}"
        ranks_S[stages] = rank
        places[kinds, stages, microbatches] = np.arange(len(rows_N3))
        repeated = places[kinds, stages, microbatches] != np.arange(len(rows_N3))
        if repeated.any():
            return f"{_at(rank, rows_N3, int(repeated.argmax()))}, and it comes again"
    return _missing(places) or _out_of_order(places, ranks_S, rows)


def _missing(places: Ints) -> str:
    """Which stage lacks its forward or backward of a microbatch, or has a backward too much."""
    has_F, has_B, has_I, has_W = places >= 0
    for wrong_SM, needed in (
        (~has_F, "no rank runs {}F{}"),
        (~(has_B | has_I), "no rank runs {0}B{1}, or {0}I{1} and {0}W{1}"),
        (has_B & (has_I | has_W), "{0}B{1} is the whole backward, and {0}I{1} or {0}W{1} runs too"),
        (has_I & ~has_W, "no rank runs {0}W{1}, the other half of {0}I{1}"),
    ):
        if wrong_SM.any():
            return needed.format(*np.argwhere(wrong_SM)[0].tolist())
    return ""


def _out_of_order(places: Ints, ranks_S: Ints, rows: Sequence[Rows]) -> str:
    for later, earlier in ((B, F), (I, F), (W, I)):
        wrong_SM = (places[later] >= 0) & (places[later] < places[earlier])
        if wrong_SM.any():
            stage, microbatch = np.argwhere(wrong_SM)[0].tolist()
            rank, place = int(ranks_S[stage]), int(places[later, stage, microbatch])
            first = Action(stage, KINDS[earlier], microbatch)
            return f"{_at(rank, rows[rank], place)}, before {first}"
    return ""


def _at(rank: int, rows_N3: Rows, place: int) -> str:
    stage, kind, microbatch = rows_N3[place].tolist()
    action = Action(stage, KINDS[kind], microbatch)
    return f"rank {rank} (row {rank + 1}), action {place + 1} is {action}"
