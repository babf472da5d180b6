"""The picture, and the points in it."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_align.planner import MachineBalance, analyze_step
from lightning_align.planner.roofline_plot import roofline_points

HARDWARE = MachineBalance("by hand", peak_flops=1e9, mem_bandwidth=1e8)


def test_points_lie_under_the_roof() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    report = analyze_step(model, lambda: model(torch.ones(64, 64)).sum())
    points = roofline_points(report, HARDWARE, top_k=20)
    names = [name for name, *_ in points]
    assert {"aten.mm", "aten.addmm", "aten.gelu"} <= set(names)
    assert "aten.ones_like" not in names  # it has no FLOPs
    for name, intensity, flops_s, share, bound in points:
        if name in ("aten.mm", "aten.addmm"):
            assert flops_s <= HARDWARE.attainable_flops(intensity) * 1.01
        assert 0 < share <= 1
        assert bound in ("compute", "memory")
    assert sum(share for *_, share, _ in points) <= 1
    assert len(roofline_points(report, HARDWARE, top_k=1)) <= 1


def test_the_picture_has_a_roof_and_its_points() -> None:
    pytest.importorskip("matplotlib")
    model = nn.Linear(8, 8)
    report = analyze_step(model, lambda: model(torch.ones(8, 8)).sum())
    figure = report.plot(HARDWARE)
    (axes,) = figure.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    (roof,) = axes.lines
    assert roof.get_xdata()[1] == HARDWARE.ridge_point == 10
    assert max(roof.get_ydata()) == HARDWARE.peak_flops
    texts = [text.get_text() for text in axes.texts]
    assert {"addmm", "mm"} <= set(texts)


def test_no_name_stands_on_another() -> None:
    pytest.importorskip("matplotlib")
    model = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    rows = torch.ones(2, 16, 32)
    figure = analyze_step(model, lambda: model(rows).sum()).plot(HARDWARE)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    names = [text for text in axes.texts if not text.get_text().startswith("ridge")]
    assert len(names) > 5
    for is_right in ("left", "right"):
        boxes = [text.get_window_extent() for text in names if text.get_ha() == is_right]
        boxes.sort(key=lambda box: box.y0)
        for below, above in pairwise(boxes):
            assert below.y0 + 6 * figure.dpi / 72 <= above.y0 + 1e-6
    assert not any("scaled_dot_product" in text.get_text() for text in names)
