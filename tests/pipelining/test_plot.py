"""Pictures and traces of timelines."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_align.pipelining import Event, simulate
from lightning_align.pipelining.plot import COLORS


def colors(path: Path) -> set[int]:
    """Every colour of more than 200 pixels, as 0xRRGGBB."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.int64).reshape(-1, 3)
    values, counts = np.unique(pixels @ [1 << 16, 1 << 8, 1], return_counts=True)
    return set(values[counts > 200].tolist())


def color(action: str) -> int:
    return int(COLORS[action][0].removeprefix("#"), 16)


def test_the_picture_has_the_colours_of_what_ran(tmp_path: Path) -> None:
    simulate("1F1B", 2, 3).to_png(tmp_path / "1f1b.png")
    drawn = colors(tmp_path / "1f1b.png")
    assert color("F") in drawn
    assert color("B") in drawn
    assert color("W") not in drawn
    simulate("ZBVZeroBubble", 2, 3).to_png(tmp_path / "zbv.png")
    drawn = colors(tmp_path / "zbv.png")
    assert {color("F"), color("I"), color("W")} <= drawn
    assert color("B") not in drawn


def test_a_measured_timeline_is_drawn_below_the_simulated_one(tmp_path: Path) -> None:
    result = simulate("1F1B", 2, 4)
    # As if all had been gradients of weights: a colour that only the measured lane can bring.
    measured = [Event(e[0], "W", *e[2:4], e.start_s + 7.0, e.end_s + 7.0) for e in result.events]
    result.to_png(tmp_path / "alone.png")
    result.to_png(tmp_path / "both.png", measured=measured, title="laid over")
    alone, both = (Image.open(tmp_path / name) for name in ("alone.png", "both.png"))
    assert both.size[1] > alone.size[1], "two lanes for each rank"
    assert color("W") not in colors(tmp_path / "alone.png")
    assert {color("F"), color("B"), color("W")} <= colors(tmp_path / "both.png")


def test_many_ranks_still_make_a_picture_of_finite_height(tmp_path: Path) -> None:
    simulate("1F1B", 128, 16).to_png(tmp_path / "many.png")
    assert Image.open(tmp_path / "many.png").size[1] <= 30 * 150


def test_the_trace_has_a_track_for_each_rank_and_measured_beside_simulated(tmp_path: Path) -> None:
    result = simulate("Interleaved1F1B", 2, 4)
    measured = [
        event._replace(start_s=event.start_s + 5, end_s=event.end_s + 5) for event in result.events
    ]
    result.to_chrome_trace(tmp_path / "trace.json", measured=measured)
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in trace if event["ph"] == "M"]
    assert names == ["simulated", "rank 0", "rank 1", "measured", "rank 0", "rank 1"]
    ran = [event for event in trace if event["ph"] == "X"]
    assert len(ran) == 2 * len(result.events)
    first, later = ran[0], ran[len(result.events)]
    assert (first["name"], first["ts"], first["dur"], first["cat"]) == ("0F0", 0, 1e6, "forward")
    assert later["ts"] == 0, "both begin at zero"
    assert later["pid"] != first["pid"]


def test_without_matplotlib_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install lightning-align\[plot\]"):
        simulate("1F1B", 2, 4).to_png(tmp_path / "picture.png")
