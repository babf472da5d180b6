"""What a step computes and moves, by module, block and operation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from lightning_align.planner.least_traffic import least_bytes, reads_of
from lightning_align.planner.module_scopes import BACKWARD, FORWARD, OPTIMIZER, RECOMPUTE, Scope
from lightning_align.planner.records import Record, Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_align.planner.balance import MachineBalance

PHASES = (FORWARD, RECOMPUTE, BACKWARD, OPTIMIZER)


@dataclass(frozen=True)
class Cost:
    """What some operations compute and move.

    Attributes:
        calls: How many operations.
        flops: FLOPs of products.
        pointwise_flops: Of all else.
        bytes: Read and written, each operation by itself.
        saved_bytes: What autograd kept for backward, of a module.
        least_bytes: What they would move if each phase of a module were one kernel.
    """

    calls: int = 0
    flops: int = 0
    pointwise_flops: int = 0
    bytes: int = 0
    saved_bytes: int = 0
    least_bytes: int = 0

    @property
    def intensity(self) -> float:
        """FLOPs of all kinds for each byte that moves."""
        return (self.flops + self.pointwise_flops) / self.bytes if self.bytes else 0.0


def cost_of(records: Iterable[Record], **more: int) -> Cost:
    """Sums over operations."""
    calls = flops = pointwise = moved = 0
    for record in records:
        calls += 1
        flops += record.flops
        pointwise += record.pointwise_flops
        moved += record.bytes
    return Cost(calls, flops, pointwise, moved, **more)


@dataclass(frozen=True, eq=False)
class StepReport:
    """What one step computes and moves. Made by ``analyze_step``.

    Attributes:
        trace: Every operation as it ran.
        module_names: Of the model, in its order.
        block_names: Of its blocks; empty where none were found.
    """

    trace: Trace = field(repr=False)
    module_names: tuple[str, ...] = field(repr=False)
    block_names: tuple[str, ...] = ()

    @cached_property
    def phases(self) -> dict[str, Cost]:
        """Forward, recompute, backward and optimizer."""
        return {
            phase: cost_of(record for record in self.trace.records if record.phase == phase)
            for phase in PHASES
        }

    @cached_property
    def _total(self) -> Cost:
        return cost_of(self.trace.records)

    @property
    def total_flops(self) -> int:
        """FLOPs of all products that ran."""
        return self._total.flops

    @property
    def forward_flops(self) -> int:
        """FLOPs of the products of forward."""
        return self.phases[FORWARD].flops

    @property
    def model_flops(self) -> int:
        """FLOPs that forward and backward need by their mathematics: nothing that was repeated.

        That is without recomputed activations, without the scores that a fused attention's
        backward computes again, and without the optimizer's products; so that it does not depend
        on the kernel of attention.
        """
        counted = [r for r in self.trace.records if r.phase in (FORWARD, BACKWARD)]
        return sum(record.flops - record.repeated_flops for record in counted)

    @property
    def pointwise_flops(self) -> int:
        """FLOPs of all that is no product."""
        return self._total.pointwise_flops

    @property
    def bytes(self) -> int:
        """Bytes that operations read and write, each by itself."""
        return self._total.bytes

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank sends to others, in rings; it gets as many."""
        return sum(record.sent for record in self.trace.records)

    @property
    def least_bytes(self) -> int:
        """Bytes if forward, recomputation, backward and update were a perfect kernel each."""
        return self._least(range(len(self.trace.records)))

    def least_bytes_of(self, numbers: Sequence[int]) -> int:
        """Bytes of some operations of one phase if they were a perfect kernel.

        Args:
            numbers: Of operations, in their order.
        """
        return self._least(numbers)

    @property
    def intensity(self) -> float:
        """FLOPs of all kinds for each byte that moves."""
        return self._total.intensity

    @property
    def peak_bytes(self) -> int:
        """The most memory that tensors took at a time, between operations."""
        return self.trace.storages.peak

    @property
    def saved_bytes(self) -> int:
        """The most that autograd kept for backward at a time."""
        return self.trace.saved.peak

    @property
    def uncounted(self) -> dict[str, int]:
        """Operations whose FLOPs are not known and were taken for 0, and how often they ran."""
        return dict(self.trace.uncounted)

    @cached_property
    def ops(self) -> dict[str, Cost]:
        """Operations by name, those that move most first."""
        groups: dict[str, list[Record]] = defaultdict(list)
        for record in self.trace.records:
            groups[record.name].append(record)
        found = {name: cost_of(records) for name, records in groups.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1].bytes))

    @cached_property
    def modules(self) -> dict[str, Cost]:
        """Modules by their names in ``named_modules()``, with all that runs inside of them."""
        return self.costs(self.module_names)

    def costs(self, names: Iterable[str]) -> dict[str, Cost]:
        """Some of ``modules``; to know all takes as long as the analysis of a small step.

        Args:
            names: Of modules.
        """
        members, saved = self._members, self._saved()
        return {
            name: cost_of(
                (self.trace.records[number] for number in members.get(name, ())),
                saved_bytes=saved[name],
                least_bytes=self._least(members.get(name, ())),
            )
            for name in names
        }

    @cached_property
    def _members(self) -> Mapping[str, Sequence[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for number, record in enumerate(self.trace.records):
            for name in enclosing(record.scope):
                found[name].append(number)
        return found

    @property
    def blocks(self) -> dict[str, Cost]:
        """Those of ``modules`` that are blocks."""
        return {name: self.modules[name] for name in self.block_names}

    def _saved(self) -> Mapping[str, int]:
        storages: dict[str, set[int]] = defaultdict(set)
        for scope, numbers in self.trace.saved_by.items():
            for name in enclosing(scope):
                storages[name] |= numbers
        sizes = self.trace.storages.sizes
        return Counter({n: sum(sizes[each] for each in found) for n, found in storages.items()})

    def _least(self, inside: Sequence[int]) -> int:
        records, sizes = self.trace.records, self.trace.storages.sizes
        phases: dict[str, list[int]] = defaultdict(list)
        for number in inside:
            phases[records[number].phase].append(number)
        return sum(least_bytes(records, each, self._reads, sizes) for each in phases.values())

    @cached_property
    def _reads(self) -> Mapping[int, Sequence[int]]:
        return reads_of(self.trace.records)

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain data, for JSON."""
        return {
            "total_flops": self.total_flops,
            "forward_flops": self.forward_flops,
            "model_flops": self.model_flops,
            "pointwise_flops": self.pointwise_flops,
            "bytes": self.bytes,
            "least_bytes": self.least_bytes,
            "intensity": self.intensity,
            "peak_bytes": self.peak_bytes,
            "sent_bytes": self.sent_bytes,
            "saved_bytes": self.saved_bytes,
            "uncounted": self.uncounted,
            "block_names": list(self.block_names),
            **by_group(self, _plain),
        }

    def to_table(self, top_k: int = 20) -> str:
        """The modules that move most as a table in Markdown.

        Args:
            top_k: How many of them.
        """
        ranked = sorted(self.modules.items(), key=lambda item: -item[1].bytes)[:top_k]
        head = "| module | GFLOP | MB moved | MB at least | FLOP/B | MB saved |"
        lines = [head, "|---|---|---|---|---|---|"]
        for name, cost in ranked:
            numbers = (cost.flops / 1e9, cost.bytes / 1e6, cost.least_bytes / 1e6)
            more = (cost.intensity, cost.saved_bytes / 1e6)
            cells = " | ".join(f"{number:.4g}" for number in (*numbers, *more))
            lines.append(f"| {name or '(all)'} | {cells} |")
        if self.uncounted:
            names = ", ".join(f"{name} ({times})" for name, times in self.uncounted.items())
            lines += ["", f"Not counted: {names}"]
        return "\n".join(lines)

    def plot(self, hardware: MachineBalance, *, top_k: int = 20) -> Figure:
        """The operations under the roofline of a machine; see ``roofline_figure``.

        Args:
            hardware: What the step would run on.
            top_k: How many operations, those that take longest.
        """
        from lightning_align.planner.roofline_plot import roofline_figure

        return roofline_figure(self, hardware, top_k=top_k)


def by_group(costs: Any, plain: Callable[[Any], Any]) -> dict[str, dict[str, Any]]:
    """The costs of phases, modules and operations, each as ``plain`` gives it."""
    return {
        group: {name: plain(cost) for name, cost in getattr(costs, group).items()}
        for group in ("phases", "modules", "ops")
    }


def _plain(cost: Cost) -> dict[str, float]:
    return {**asdict(cost), "intensity": cost.intensity}


@lru_cache(4096)  # asked for each operation, and a step has few scopes
def enclosing(scope: Scope) -> frozenset[str]:
    """All modules around an operation: those that were called, and those that contain them."""
    found = {""}
    for name in scope:
        while name:
            found.add(name)
            name = name.rpartition(".")[0]
    return frozenset(found)
