"""Timelines of pipeline schedules as pictures and as Chrome traces, simulated and measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_align.figure import new_figure
from lightning_align.pipelining.actions import Event

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# kind -> colour (Okabe and Ito's, told apart by colour-blind readers too) and meaning
COLORS = {
    "F": ("#56b4e9", "forward"),
    "B": ("#e69f00", "backward"),
    "I": ("#f0c64d", "backward for the input"),
    "W": ("#4cb08d", "backward for the weights"),
}
MAX_NUMBERED = 1200  # actions; with more of them the numbers of the microbatches are unreadable


def draw_timeline(
    path: str | Path,
    events: Sequence[Event],
    *,
    measured: Sequence[Event] | None = None,
    title: str = "",
) -> None:
    """Write a timeline as a picture: a lane for each rank, its microbatches numbered.

    Later stages of a rank are drawn darker. ``measured`` is drawn in a second, hatched lane below
    each rank's; both begin at zero, and neither is stretched.

    Args:
        path: Picture to write; the ending names the format.
        events: What was simulated.
        measured: What a real run did, in the same unit of time.
        title: Text above.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    num_ranks = 1 + max(event.rank for event in events)
    lane = 0.55 if measured else 0.4
    height_in = min(1.4 + lane * num_ranks, 30.0)
    figure = new_figure(12, height_in)
    axes = figure.add_subplot()
    last_first = sorted([*events, *(measured or ())], key=lambda event: -event.stage_index)
    first_stages = {event.rank: event.stage_index for event in last_first}
    if measured:
        _draw_lanes(axes, _from_zero(events), first_stages, top=-0.45, height=0.43)
        _draw_lanes(axes, _from_zero(measured), first_stages, top=0.02, height=0.43, hatch="///")
    else:
        _draw_lanes(axes, _from_zero(events), first_stages, top=-0.42, height=0.84)
    axes.set_ylim(num_ranks - 0.4, -0.6)
    every = max(1, num_ranks // 32)
    axes.set_yticks(range(0, num_ranks, every), [f"rank {r}" for r in range(0, num_ranks, every)])
    axes.autoscale_view(scaley=False)
    axes.set_xmargin(0)
    axes.set_xlabel("time" + (" (plain: simulated, hatched: measured)" if measured else ""))
    axes.set_title(title)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _draw_legend(figure, events)
    figure.savefig(path)


def _from_zero(events: Sequence[Event]) -> list[Event]:
    begin = min(event.start_s for event in events)
    return [
        event._replace(start_s=event.start_s - begin, end_s=event.end_s - begin) for event in events
    ]


def _draw_lanes(
    axes: Axes,
    events: Sequence[Event],
    first_stages: dict[int, int],
    *,
    top: float,
    height: float,
    hatch: str | None = None,
) -> None:
    from matplotlib.collections import PolyCollection

    corners, colors = [], []
    for event in events:
        low, high = event.rank + top, event.rank + top + height
        start, end = event.start_s, event.end_s
        corners.append([(start, low), (end, low), (end, high), (start, high)])
        later = event.stage_index > first_stages[event.rank]
        colors.append(_color(event.action, later))
    many = len(events) > MAX_NUMBERED
    edges = "none" if many else "white"
    looks: dict[str, Any] = {"facecolors": colors, "edgecolors": edges, "hatch": hatch}
    axes.add_collection(PolyCollection(corners, linewidths=0.5, **looks))
    if many:
        return
    length = max(event.end_s for event in events)
    for event in events:
        if event.end_s - event.start_s > length / 250:  # wide enough for a number
            x, y = (event.start_s + event.end_s) / 2, event.rank + top + height / 2
            axes.text(x, y, str(event.microbatch_index), ha="center", va="center", fontsize=6)


def _color(action: str, later: bool) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(COLORS[action][0])
    shade = 0.72 if later else 1.0
    return red * shade, green * shade, blue * shade


def _draw_legend(figure: Figure, events: Sequence[Event]) -> None:
    from matplotlib.patches import Patch

    drawn = {event.action for event in events}
    handles = [
        Patch(color=color, label=meaning)
        for action, (color, meaning) in COLORS.items()
        if action in drawn
    ]
    figure.legend(handles=handles, loc="outside lower right", ncols=4, frameon=False)


def write_chrome_trace(
    path: str | Path, events: Sequence[Event], *, measured: Sequence[Event] | None = None
) -> None:
    """Write a timeline that Perfetto and chrome://tracing open: a track for each rank.

    Args:
        path: JSON file to write.
        events: What was simulated.
        measured: What a real run did, as a second process beside it.
    """
    trace: list[dict[str, Any]] = []
    for process, (name, timeline) in enumerate((("simulated", events), ("measured", measured))):
        if not timeline:
            continue
        trace.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        thread = {"ph": "M", "name": "thread_name", "pid": process}
        ranks = sorted({event.rank for event in timeline})
        trace += [{**thread, "tid": r, "args": {"name": f"rank {r}"}} for r in ranks]
        trace += [
            {
                "ph": "X",
                "name": f"{event.stage_index}{event.action}{event.microbatch_index}",
                "cat": COLORS[event.action][1],
                "pid": process,
                "tid": event.rank,
                "ts": event.start_s * 1e6,
                "dur": (event.end_s - event.start_s) * 1e6,
            }
            for event in _from_zero(timeline)
        ]
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"traceEvents": trace, "displayTimeUnit": "ms"}, file)
