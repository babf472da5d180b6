"""What Python of checkpoints costs follows from few regions and from many."""

from collections.abc import Callable
from itertools import count

import pytest
import torch

from lightning_align.planner import checkpoint_costs
from lightning_align.planner.report import StepReport


def costs(
    monkeypatch: pytest.MonkeyPatch, beyond: Callable[[int, int], float]
) -> tuple[float, float]:
    """By a clock on which all steps take as long, so that the rest is what is not taken off.

    Args:
        monkeypatch: For one step of each.
        beyond: Seconds of Python by regions and tensors.
    """
    monkeypatch.setattr(checkpoint_costs, "STEPS", 1)
    ticks = count()

    def recomputed(report: StepReport) -> float:
        regions = report.trace.checkpoints
        return -beyond(len(regions), sum(each.saved for each in regions))

    device = torch.device("cpu")
    return checkpoint_costs.checkpoint_costs(
        recomputed, device, torch.float32, lambda: float(next(ticks))
    )


def test_regions_and_tensors_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    found = costs(monkeypatch, lambda regions, tensors: 5.0 * regions + 0.25 * tensors)
    assert found == pytest.approx((5.0, 0.25))


def test_neither_is_below_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    region, tensor = costs(monkeypatch, lambda regions, tensors: 5.0 * regions - 0.01 * tensors)
    assert tensor == 0.0
    assert 0 < region < 5.0
    region, tensor = costs(monkeypatch, lambda regions, tensors: 0.25 * tensors - 0.1 * regions)
    assert region == 0.0
    assert 0 < tensor < 0.25
    assert costs(monkeypatch, lambda regions, tensors: -1.0) == (0.0, 0.0)


def test_modules_are_as_before() -> None:
    module = torch.nn.Tanh()
    with checkpoint_costs._checkpointed([module]):
        assert "forward" in vars(module)
    assert "forward" not in vars(module)
