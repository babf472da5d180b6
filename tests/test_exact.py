"""The yardstick of the arithmetic: it lets pass what another order of additions gives, no more."""

import pytest
import torch

from tests.helpers.exact import FACTOR, assert_as_exact_as, assert_rounded_once

EXACT = torch.tensor([1.0, -3.0, 0.5], dtype=torch.float64)


def off(error: float) -> torch.Tensor:
    """A result in fp32 whose middle entry is off by so much."""
    return (EXACT + torch.tensor([0.0, error, 0.0])).float()


def test_ours_may_be_as_far_from_float64_as_theirs_times_the_factor() -> None:
    assert_as_exact_as(off(0.9 * FACTOR * 1e-3), off(1e-3), EXACT)
    assert_as_exact_as(off(0.9 * FACTOR * 1e-3), [off(0.0), off(-1e-3)], EXACT)
    with pytest.raises(AssertionError, match=r"0\.0044 where 0\.004 is"):
        assert_as_exact_as(off(1.1 * FACTOR * 1e-3), off(1e-3), EXACT)


def test_theirs_are_not_more_exact_than_a_rounding() -> None:
    assert_as_exact_as(off(1e-6), off(0.0), EXACT)
    with pytest.raises(AssertionError):
        assert_as_exact_as(off(1e-5), off(0.0), EXACT)


def test_other_shapes_and_dtypes_are_no_comparison() -> None:
    for other in (off(0.0)[:2], off(0.0).double()):
        with pytest.raises(AssertionError):
            assert_as_exact_as(other, off(0.0), EXACT)
    with pytest.raises(AssertionError):
        assert_as_exact_as(off(0.0), off(0.0), EXACT.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding_and_no_second(dtype: torch.dtype) -> None:
    exact = torch.linspace(-4, 4, 1001, dtype=torch.float64)
    assert_rounded_once(exact.float().to(dtype), exact)
    unit = torch.finfo(dtype).eps
    with pytest.raises(AssertionError):
        assert_rounded_once((exact * (1 + unit)).to(dtype), exact)
