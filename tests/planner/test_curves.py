"""Curves of time, and which one an operation has."""

import pytest

from lightning_align.planner.curves import class_of, interpolated
from tests.planner.test_balance import record


def test_a_curve_goes_through_its_points() -> None:
    """Between them a power law: from 1 s to 16 s while the work grows a hundredfold, 4 s."""
    curve = [(100.0, 1.0), (10_000.0, 16.0)]
    assert [interpolated(curve, work) for work in (100, 1000, 10_000)] == pytest.approx([1, 4, 16])
    assert interpolated(curve, 0) == interpolated(curve, 50) == 1
    assert interpolated(curve, 20_000) == 32


def test_time_grows_with_work() -> None:
    curve = [(10.0, 1.0), (100.0, 2.0), (1000.0, 15.0)]
    times = [interpolated(curve, 1.3**n) for n in range(40)]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("aten.gelu_backward", "pointwise", "functions"),
        ("aten._foreach_sqrt", "pointwise", "functions"),
        ("aten.exp_", "pointwise", "functions"),
        ("aten.tanh", "pointwise", "tanh"),
        ("aten.pow", "pointwise", "pointwise"),  # small powers are products
        ("aten.add_", "pointwise", "pointwise"),
        ("aten._scaled_dot_product_flash_attention_for_cpu", "attention", "attention"),
        ("aten._softmax_backward_data", "norm", "norm backward"),
        ("lightning_align.mine", "unknown", "move"),
    ],
)
def test_classes(name: str, kind: str, expected: str) -> None:
    assert class_of(record(name, kind)) == expected
