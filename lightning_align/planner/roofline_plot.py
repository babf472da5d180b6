"""The roofline of a machine, and the operations of a step under it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_align.figure import new_figure
from lightning_align.planner.balance import MachineBalance
from lightning_align.planner.report import Cost, StepReport
from lightning_align.planner.step_time import COMPUTE, MEMORY, OVERHEAD, StepTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[str, float, float, float, str]  # name, FLOPs a byte, FLOP/s, share of time, bound
# Okabe and Ito's, told apart by colour-blind readers too
COLORS = {COMPUTE: "#0072b2", MEMORY: "#d55e00", OVERHEAD: "#999999"}
FONT = 6  # points
ATTENTION = re.compile("_scaled_dot_product_.*attention(_for_cpu)?")
LARGEST = 1200  # points squared, of an operation that takes all the time


def roofline_figure(report: StepReport, hardware: MachineBalance, *, top_k: int = 20) -> Figure:
    """A log-log picture: FLOPs a byte to the right, predicted FLOP/s upwards, sized by time.

    Args:
        report: Of the step.
        hardware: Whose roofline it is.
        top_k: How many operations, those that take longest.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = new_figure(8, 5.5)
    axes = figure.add_subplot()
    points = roofline_points(report, hardware, top_k=top_k)
    _draw_roof(axes, hardware, [intensity for _, intensity, _, _, _ in points])
    for _, intensity, flops_s, share, bound in points:
        axes.scatter(intensity, flops_s, s=LARGEST * share, color=COLORS[bound], alpha=0.7)
    for bound, color in COLORS.items():
        axes.scatter([], [], color=color, label=f"bound by {bound}")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s")
    axes.set_title(f"{hardware.name}, {hardware.dtype}: a step of {_total(report, hardware)}")
    axes.legend(fontsize=7, loc="lower right")
    _name(figure, axes, points, hardware.ridge_point)
    return figure


def roofline_points(report: StepReport, hardware: MachineBalance, *, top_k: int) -> list[Point]:
    """Name, FLOPs a byte, predicted FLOP/s, share of the time and bound of operations.

    Operations without FLOPs have no place in the picture.

    Args:
        report: Of the step.
        hardware: What it would run on.
        top_k: How many, those that take longest.
    """
    times = StepTime(report, hardware)
    found = []
    for name, cost in list(times.ops.items())[:top_k]:
        op = report.ops.get(name, Cost())  # those that make views have no cost but time
        flops = op.flops + op.pointwise_flops
        if flops and op.bytes and cost.seconds:
            share = cost.seconds / times.seconds
            found.append((name, op.intensity, flops / cost.seconds, share, cost.bound))
    return found


def _draw_roof(axes: Axes, hardware: MachineBalance, intensities: list[float]) -> None:
    ridge = hardware.ridge_point
    ends = [min([*intensities, ridge]) / 4, ridge, max([*intensities, ridge]) * 4]
    roof = [hardware.attainable_flops(end) for end in ends]
    axes.plot(ends, roof, color="black", linewidth=1.2)
    text = f"ridge at {ridge:.3g} FLOPs a byte"
    axes.annotate(text, (ridge, hardware.peak_flops), fontsize=7, ha="right", va="bottom")


def _name(figure: Figure, axes: Axes, points: Sequence[Point], ridge: float) -> None:
    """Names beside the points, towards the middle, none on another."""
    figure.draw_without_rendering()  # so that it is known where points are
    to_points = 72 / figure.dpi
    for is_right in (False, True):
        side = [point for point in points if (point[1] > ridge) == is_right]
        free = float("-inf")  # height from which on there is room
        for name, intensity, flops_s, share, _ in sorted(side, key=lambda point: point[2]):
            height = to_points * axes.transData.transform((intensity, flops_s))[1]
            place = max(height, free)
            free = place + FONT + 1
            beside = (LARGEST * share) ** 0.5 / 2 + 3
            axes.annotate(
                ATTENTION.sub("attention", name.removeprefix("aten.")),
                (intensity, flops_s),
                xytext=(-beside if is_right else beside, place - height),
                textcoords="offset points",
                ha="right" if is_right else "left",
                va="center",
                fontsize=FONT,
            )


def _total(report: StepReport, hardware: MachineBalance) -> str:
    seconds = StepTime(report, hardware).seconds
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
