"""The picture has what was recorded, where and when it was."""

import pytest

from lightning_align.offload.traffic import Event
from lightning_align.reports.step_timeline import timeline

pytest.importorskip("matplotlib")


def test_each_lane_has_its_events_and_time_begins_at_zero():
    events = [
        Event("", 9.0, 10.0),  # before the step
        Event("forward", 10.0, 12.0),
        Event("read", 10.0, 11.0),
        Event("backward", 12.0, 16.0),
        Event("stall", 13.0, 13.5),
        Event("read", 12.5, 13.5),
        Event("write", 14.0, 15.0),
        Event("sync", 16.0, 16.5),
    ]
    figure = timeline(events, "a step")
    (axes,) = figure.axes
    drawn = {}
    for bars in axes.collections:
        boxes = [path.get_extents() for path in bars.get_paths()]
        drawn[bars.get_label()] = [(box.x0, box.x1, (box.y0 + box.y1) / 2) for box in boxes]
    assert drawn == {
        "forward": [(0, 2, 0)],
        "backward": [(2, 6, 0)],
        "stall": [(3, 3.5, 0)],
        "read": [(0, 1, 1), (2.5, 3.5, 1)],
        "write": [(4, 5, 2)],
        "fdatasync": [(6, 6.5, 2)],
    }
    assert axes.get_title() == "a step"


def test_nothing_recorded_is_told():
    with pytest.raises(ValueError, match=r"timeline\(events=\[\]\).*Call Traffic\.record"):
        timeline([])
