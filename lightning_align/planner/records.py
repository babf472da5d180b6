"""What is written down of a step: its operations in order, their memory, what autograd holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lightning_align.planner.live_bytes import Held, Storages
from lightning_align.planner.module_scopes import Scope


class Region(NamedTuple):
    """Memory that an operation reads or writes: of which storage, from where on, how much."""

    storage: int
    offset: int
    bytes: int


class Record(NamedTuple):
    """One operation.

    Attributes:
        name: Of it, ``"aten.mm"``.
        kind: What bounds its speed, as ``op_flops`` has it.
        phase: Forward, recompute, backward or optimizer.
        scope: Names of the modules that were called, the innermost last.
        flops: Of products.
        repeated_flops: Those of them that forward has done before.
        pointwise_flops: Of all else.
        bytes: Read and written.
        reads: From where.
        writes: Where to.
        dtype: Of what it computes with.
        tensors: How many it is given, for what is launched once for each.
        made: Bytes of each storage that is new with it.
        sent: Bytes that this rank sends to others with it.
    """

    name: str
    kind: str
    phase: str
    scope: Scope
    flops: int
    repeated_flops: int
    pointwise_flops: int
    bytes: int
    reads: tuple[Region, ...]
    writes: tuple[Region, ...]
    dtype: torch.dtype | None
    tensors: int
    made: tuple[int, ...] = ()
    sent: int = 0


@dataclass
class Checkpoint:
    """What a checkpoint ran again.

    Attributes:
        first: Number of the first operation.
        last: Of the last one.
        saved: Tensors that autograd would have saved; the checkpoint's Python is called for each.
    """

    first: int
    last: int
    saved: int


@dataclass
class Trace:
    """What a step did.

    Attributes:
        records: Its operations, in order; complete when the context that writes them has ended.
        storages: All memory that they used.
        saved: What autograd holds for backward.
        saved_by: Scope -> numbers of the storages that were saved in it.
        views: Phase and scope -> how many operations made a view, which only costs its call.
        checkpoints: What was recomputed, in order.
        uncounted: Operations whose FLOPs are not known, and how often they ran.
    """

    records: list[Record] = field(default_factory=list)
    storages: Storages = field(default_factory=Storages)
    saved: Held = field(default_factory=Held)
    saved_by: dict[Scope, set[int]] = field(default_factory=dict)
    views: Counter[tuple[str, Scope]] = field(default_factory=Counter)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    uncounted: dict[str, int] = field(default_factory=dict)
