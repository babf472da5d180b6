"""How long a step takes on a machine: each operation by the roofline, and what bounds it.

An operation takes what its arithmetic or its bytes need, whichever is longer, and what it costs to
be called at all. A processor does one after the other; a device that runs while the next operation
is prepared takes the longer of both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_align._errors import argument_error
from lightning_align.planner.analyze import analyze_step
from lightning_align.planner.balance import MachineBalance
from lightning_align.planner.module_scopes import RECOMPUTE, Scope
from lightning_align.planner.records import Checkpoint, Record
from lightning_align.planner.report import StepReport, by_group, enclosing

COMPUTE, MEMORY, OVERHEAD = "compute", "memory", "overhead"
_FIGURES = {COMPUTE: "peak_flops", MEMORY: "mem_bandwidth"}


# Names of what is no operation: of all that make a view, and of what a checkpoint adds to them.
VIEWS, CHECKPOINT = "views", "checkpoint"


class OpTime(NamedTuple):
    """Seconds of an operation, and what bounds it: compute, memory or overhead.

    Attributes:
        name: Of it.
        phase: Of the step.
        scope: Modules that it belongs to.
        seconds: That it takes.
        bound: By what.
    """

    name: str
    phase: str
    scope: Scope
    seconds: float
    bound: str


@dataclass(frozen=True)
class TimeCost:
    """Seconds of some operations, and by what they are bound for most of them.

    Attributes:
        seconds: In all.
        bound: Compute, memory or overhead.
        by_bound: Seconds by what bounds them.
    """

    seconds: float
    bound: str
    by_bound: Mapping[str, float]


def time_of(record: Record, hardware: MachineBalance) -> OpTime:
    """Seconds of one operation.

    Args:
        record: The operation.
        hardware: What it runs on.
    """
    overhead, kernel = hardware.overhead(record.phase), hardware.kernel_seconds(record)
    fresh = hardware.fresh_seconds(record)
    busy = kernel + fresh
    seconds = max(overhead, busy) if hardware.is_asynchronous else overhead + busy
    if overhead >= busy:
        bound = OVERHEAD
    else:
        memory = hardware.memory_seconds(record) + fresh
        is_compute = hardware.compute_seconds(record) >= memory
        bound = COMPUTE if is_compute else MEMORY
    return OpTime(record.name, record.phase, record.scope, seconds, bound)


@dataclass(frozen=True, eq=False)
class StepTime:
    """Predicted time of a step. Made by ``predict_step_time``.

    Attributes:
        report: What it computes and moves.
        hardware: What it would run on.
    """

    report: StepReport
    hardware: MachineBalance = field(repr=False)

    @cached_property
    def op_times(self) -> list[OpTime]:
        """Of each operation, in order; then of views and checkpoints, by where they are."""
        trace, hardware = self.report.trace, self.hardware
        found = self._of_records()
        if not hardware.is_asynchronous:  # which is busy while they are made
            for (phase, scope), count in trace.views.items():
                seconds = count * hardware.overhead(phase)
                found.append(OpTime(VIEWS, phase, scope, seconds, OVERHEAD))
            for each in trace.checkpoints:
                seconds, scope = hardware.checkpoint_seconds(each), self._scope_of(each)
                found.append(OpTime(CHECKPOINT, RECOMPUTE, scope, seconds, OVERHEAD))
        return found

    def _of_records(self) -> list[OpTime]:
        """As ``time_of`` has them, which is asked once for all that take as long."""
        known: dict[tuple[object, ...], OpTime] = {}
        found = []
        for record in self.report.trace.records:
            work = record.flops, record.pointwise_flops, record.bytes
            key = record.name, record.kind, record.phase, work, record.dtype, record.made
            alike = known.get(key)
            if alike is None:
                alike = known[key] = time_of(record, self.hardware)
            op = OpTime(alike.name, alike.phase, record.scope, alike.seconds, alike.bound)
            found.append(op)
        return found

    def _scope_of(self, checkpoint: Checkpoint) -> Scope:
        """The innermost module in which it began and ended."""
        records = self.report.trace.records
        first, last = records[checkpoint.first].scope, records[checkpoint.last].scope
        return (max(enclosing(first) & enclosing(last), key=len),)

    @cached_property
    def total(self) -> TimeCost:
        """Of the whole step."""
        return _summed(self.op_times)

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.total.seconds

    @property
    def bound(self) -> str:
        """What the step is bound by for most of its time."""
        return self.total.bound

    @property
    def interval(self) -> tuple[float, float]:
        """Seconds if the machine does the most, and the least, that was measured of it."""
        low = high = 0.0
        for bound, seconds in self.total.by_bound.items():
            figure = _FIGURES.get(bound, "")
            worst, best = self.hardware.intervals.get(figure, (1.0, 1.0))
            value = getattr(self.hardware, figure) if figure in self.hardware.intervals else 1.0
            low += seconds * value / best
            high += seconds * value / worst
        return low, high

    @cached_property
    def phases(self) -> dict[str, TimeCost]:
        """Forward, recompute, backward and optimizer."""
        return self._grouped(lambda op: [op.phase])

    @cached_property
    def ops(self) -> dict[str, TimeCost]:
        """Operations by name, those that take longest first."""
        return self._grouped(lambda op: [op.name])

    @cached_property
    def modules(self) -> dict[str, TimeCost]:
        """Modules by name, with all that runs inside of them."""
        found = self._grouped(lambda op: enclosing(op.scope))
        return {name: found.get(name, _summed([])) for name in self.report.module_names}

    @property
    def blocks(self) -> dict[str, TimeCost]:
        """Those of ``modules`` that are blocks."""
        return {name: self.modules[name] for name in self.report.block_names}

    def _grouped(self, groups: Callable[[OpTime], Iterable[str]]) -> dict[str, TimeCost]:
        members: dict[str, list[OpTime]] = defaultdict(list)
        for op in self.op_times:
            for group in groups(op):
                members[group].append(op)
        found = {group: _summed(ops) for group, ops in members.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1].seconds))

    def to_dict(self) -> dict[str, Any]:
        """All times as plain data, for JSON."""
        return {
            "hardware": self.hardware.name,
            "seconds": self.seconds,
            "interval": list(self.interval),
            "bound": self.bound,
            "by_bound": dict(self.total.by_bound),
            **by_group(self, _plain),
        }

    def to_table(self, top_k: int = 20) -> str:
        """The modules that take longest as a table in Markdown.

        Args:
            top_k: How many of them.
        """
        lines = ["| module | ms | % | bound by | FLOP/B |", "|---|---|---|---|---|"]
        ranked = sorted(self.modules.items(), key=lambda item: -item[1].seconds)[:top_k]
        for name, cost in ranked:
            share = 100 * cost.seconds / self.seconds if self.seconds else 0.0
            intensity = self.report.modules[name].intensity
            numbers = f"{1e3 * cost.seconds:.4g} | {share:.1f} | {cost.bound} | {intensity:.4g}"
            lines.append(f"| {name or '(all)'} | {numbers} |")
        return "\n".join(lines)


def _summed(ops: Iterable[OpTime]) -> TimeCost:
    by_bound = dict.fromkeys((COMPUTE, MEMORY, OVERHEAD), 0.0)
    for op in ops:
        by_bound[op.bound] += op.seconds
    return TimeCost(sum(by_bound.values()), max(by_bound, key=by_bound.__getitem__), by_bound)


def _plain(cost: TimeCost) -> dict[str, Any]:
    return {"seconds": cost.seconds, "bound": cost.bound, "by_bound": dict(cost.by_bound)}


def predict_step_time(
    model: nn.Module, step_fn: Callable[[], Tensor | None], hw: MachineBalance
) -> StepTime:
    """Predict how long a step takes, from running it once; it is never timed.

    Args:
        model: Whose modules are named.
        step_fn: Returns the loss, or makes a whole step of its own; as for ``analyze_step``.
        hw: What it would run on: measured, or from a spec sheet.

    Raises:
        ValueError: As ``analyze_step``; or if ``hw`` is no ``MachineBalance``.
    """
    _check(hw)
    return StepTime(analyze_step(model, step_fn), hw)


def _check(hw: object) -> None:
    if not isinstance(hw, MachineBalance):
        way_out = f"Write MachineBalance.from_spec({hw!r})" if isinstance(hw, str) else ""
        rule = "must be a MachineBalance"
        raise argument_error("predict_step_time", "hw", hw, rule, way_out)
