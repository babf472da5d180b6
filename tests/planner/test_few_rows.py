"""What few rows reach is a share of the roofline; never how fast a machine is."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch

from lightning_align.planner import HardwareSpec, few_rows, measure
from lightning_align.planner.few_rows import FewRows, call_without_autograd

HALF_AT_TWO = FewRows(((1.0, 1.0), (2.0, 0.5), (8.0, 0.125)), attention=0.25, call_s=1e-6)


@pytest.mark.parametrize(
    ("rows", "share"), [(1, 1.0), (2, 0.5), (4, 0.25), (8, 0.125), (64, 0.125), (0.5, 1.0)]
)
def test_a_share_is_a_power_law_between_what_was_measured(rows: float, share: float) -> None:
    assert HALF_AT_TWO.share(rows) == pytest.approx(share)


def test_shares_are_of_the_roofline_and_never_above_it() -> None:
    """A product takes twice the bytes of its fp32 operands at a byte a second, or no time."""

    def seconds(run: Callable[..., Any], shapes: list[tuple[int, ...]]) -> float:
        inputs = [torch.zeros(shape) for shape in shapes]
        result = run(*inputs)
        if run is not torch.nn.functional.linear:
            return 1e-9
        return 2.0 * sum(tensor.nbytes for tensor in (*inputs, result))

    found = few_rows.few_rows(seconds, 1e18, 1.0, torch.float32, 3.0)
    assert dict(found.products) == {float(rows): 0.5 for rows in few_rows.ROWS}
    assert (found.attention, found.call_s) == (1.0, 3.0)


def test_calls_are_what_a_step_takes_beside_its_bytes() -> None:
    ticks = count()
    one = call_without_autograd(lambda: float(next(ticks)), 1e18)
    assert 0 < one < 1 / 200  # a second, by some hundred operations
    assert call_without_autograd(lambda: float(next(ticks)), 1e-9) == 0.0


def test_both_dtypes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SAMPLE_S", 1e-5)
    monkeypatch.setattr(measure, "SAMPLES", 2)
    monkeypatch.setattr(measure, "TURNS_BYTES", 1 << 16)
    monkeypatch.setattr(few_rows, "ROWS", (1, 2))
    monkeypatch.setattr(few_rows, "STEPS", 2)
    # Caches without end: else what they take may be all of a call on a fast processor.
    wide, half = measure.few_rows_of({torch.float32: 1e9, torch.bfloat16: 1e9}, 1e9, 1e15)
    for found in (wide, half):
        assert [rows for rows, _ in found.products] == [1.0, 2.0]
        assert all(0 < share <= 1 for _, share in (*found.products, (0, found.attention)))
    assert wide.call_s == half.call_s > 0


def test_hardware_without_it_is_equal_to_itself() -> None:
    spec = HardwareSpec.from_name("h100-sxm")
    assert spec.few_rows is None
    known = replace(spec, few_rows=HALF_AT_TWO)
    assert hash(known) == hash(replace(spec, few_rows=HALF_AT_TWO))
    assert known != spec
