"""Numbers with units."""

import math

import pytest

from lightning_align.planner.quantities import (
    BYTES,
    BYTES_A_SECOND,
    FLOPS,
    SECONDS,
    quantity,
    shown,
    shown_time,
)


@pytest.mark.parametrize(
    ("value", "unit", "number"),
    [
        ("80GB", BYTES, 80e9),
        ("24 GiB", BYTES, 24 * 2**30),
        ("512 mb", BYTES, 512e6),
        ("3.35TB/s", BYTES_A_SECOND, 3.35e12),
        ("989 TFLOPS", FLOPS, 989e12),
        ("1.5PFLOP/s", FLOPS, 1.5e15),
        ("2e12", BYTES_A_SECOND, 2e12),
        (16, BYTES, 16.0),
        ("30min", SECONDS, 1800.0),
        ("1.5 h", SECONDS, 5400.0),
        ("20ms", SECONDS, 0.02),
        ("2y", SECONDS, 730.5 * 86400),
        ("90", SECONDS, 90.0),
    ],
)
def test_texts_with_units_and_bare_numbers(value: str | int, unit: str, number: float) -> None:
    assert quantity("here", "it", value, unit) == pytest.approx(number)


@pytest.mark.parametrize(
    "value", ["80GB/s", "80 apples", "", "GB", "1.2.3GB", math.nan, math.inf, True, None]
)
def test_what_is_no_number_of_bytes_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"here\(it=.*finite number of bytes.*'80GB'"):
        quantity("here", "it", value, BYTES)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, "0GB"])
def test_there_must_be_some_of_it(value: object) -> None:
    with pytest.raises(ValueError, match="must be positive, in bytes"):
        quantity("here", "it", value, BYTES)  # type: ignore[arg-type]
    assert quantity("here", "it", 0, BYTES, zero=True) == 0


def test_numbers_are_shown_with_three_digits() -> None:
    shapes = [(1.6e10, "16 GB"), (2.5e12, "2.5 TB"), (999.6e9, "1 TB"), (12, "12 B")]
    assert [shown(number) for number, _ in shapes] == [text for _, text in shapes]


def test_times_are_shown_in_their_largest_unit() -> None:
    times = [(5400, "1.5 h"), (0.02, "20 ms"), (59.99, "1 min"), (3 * 86400, "3 d"), (45, "45 s")]
    assert [shown_time(seconds) for seconds, _ in times] == [text for _, text in times]
    with pytest.raises(ValueError, match="finite number of seconds"):
        quantity("here", "it", "30GB", SECONDS)
