"""Loss and norm of a window, as a trainer would ask for them; in runs in test_guard.py."""

import math

from lightning_align.callbacks.spikes.measures import Measured


def test_a_measure_is_finite_if_both_numbers_are() -> None:
    assert Measured(1.0, 2.0).is_finite
    assert not Measured(math.nan, 2.0).is_finite
    assert not Measured(1.0, math.inf).is_finite
