"""What calls cost is what a step takes beyond its kernels."""

from itertools import count

import pytest
import torch

from lightning_align.planner import call_costs
from lightning_align.planner.curves import Curve

CLASSES = ("product", "attention", "attention backward", "pointwise", "functions", "tanh", "norm")
CLASSES += ("norm backward", "reduction", "move")


def costs(monkeypatch: pytest.MonkeyPatch, kernel_s: float) -> dict[str | None, float]:
    """By a clock that moves by a second whenever it is looked at."""
    monkeypatch.setattr(call_costs, "STEPS", 1)
    curves: dict[str, Curve] = {name: [(1e18, kernel_s)] for name in CLASSES}
    ticks = count()
    device = torch.device("cpu")
    return call_costs.call_costs(curves, {}, device, torch.float32, lambda: float(next(ticks)))


def test_kernels_are_taken_off_and_the_rest_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    free, busy = costs(monkeypatch, 0.0), costs(monkeypatch, 1e-4)
    assert set(free) == {None, "forward", "recompute", "backward", "optimizer"}
    assert free["recompute"] == free["forward"]
    for phase in ("forward", "backward", "optimizer"):
        assert 0 < busy[phase] < free[phase] < 1  # a second, by some hundred operations


def test_kernels_that_take_longer_than_the_step_leave_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert set(costs(monkeypatch, 10.0).values()) == {0.0}
