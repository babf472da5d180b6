"""Plans as bars: what memory is for, and what a step spends its time with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_align.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_align.planner.planner import Plan


def draw_plans(path: str | Path, plans: Sequence[Plan]) -> None:
    """Draw memory and time of plans side by side.

    Args:
        path: Of the picture; its ending says the format.
        plans: A bar each.

    Raises:
        ImportError: If matplotlib is not installed (extra: plot).
    """
    figure = new_figure(10, 1.5 + 0.6 * len(plans))
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{plan.parallel.devices} x {plan.hardware.name}" for plan in plans]
    _stack(left, names, [plan.memory_breakdown for plan in plans], 1e9)
    _stack(right, names, [plan.breakdown for plan in plans], 1.0)
    left.set_xlabel("GB of a device")
    right.set_xlabel("seconds a step")
    for place, plan in enumerate(plans):
        left.plot([plan.hardware.memory / 1e9] * 2, [place - 0.4, place + 0.4], color="black")
    figure.savefig(path)


def _stack(
    axes: Axes, names: Sequence[str], parts: Sequence[Mapping[str, float]], unit: float
) -> None:
    begins = [0.0] * len(names)
    for part in dict.fromkeys(name for each in parts for name in each):
        widths = [each.get(part, 0.0) / unit for each in parts]
        if sum(widths) > 0:
            axes.barh(range(len(names)), widths, left=begins, label=part)
        begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.legend(fontsize="small")
