"""One step of a run whose values come from disk, as a picture of its own events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_align.figure import new_figure
from lightning_align.offload.traffic import READ, STALL, SYNC, WRITE, Event
from lightning_align.pipelining.plot import COLORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From top to bottom: lane -> kinds of events with their colours (Okabe and Ito's), the last on top.
_LANES = {
    "compute": {
        "forward": COLORS["F"][0],
        "backward": COLORS["B"][0],
        "update": "#4cb08d",
        "commit": "#999999",
        STALL: "#d55e00",
    },
    READ: {READ: "#0072b2"},
    WRITE: {WRITE: "#cc79a7", SYNC: "#5b2a4a"},
}
_NAMES = {STALL: "stall", SYNC: "fdatasync"}


def timeline(events: Sequence[Event], title: str = "") -> Figure:
    """Draw what a step did: its phases and waits, and below them what the threads moved.

    Where several threads move something at the same time, the lane is darker.

    Args:
        events: Of a step, as ``offload.traffic.Traffic`` records them.
        title: Text above.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If nothing was recorded.
    """
    known = {what for lane in _LANES.values() for what in lane}
    events = [event for event in events if event.what in known]
    if not events:
        raise ValueError("timeline(events=[]): nothing was recorded. Call Traffic.record first.")
    begin = min(event.start_s for event in events)
    figure = new_figure(10, 2.4)
    axes = figure.add_subplot()
    for height, kinds in enumerate(_LANES.values()):
        for what, color in kinds.items():
            spans = [(e.start_s - begin, e.end_s - e.start_s) for e in events if e.what == what]
            if spans:
                look: Any = {"facecolors": color, "alpha": 0.6 if height else 1.0, "linewidth": 0}
                label = _NAMES.get(what, what)
                axes.broken_barh(spans, (height - 0.4, 0.8), label=label, **look)
    axes.set_ylim(len(_LANES) - 0.4, -0.6)
    axes.set_yticks(range(len(_LANES)), list(_LANES))
    axes.set_xmargin(0)
    axes.set(xlabel="seconds", title=title)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=8, frameon=False)
    return figure
