"""The spike detector: its formulas, what it flags, what it lets pass and what it remembers."""

import json
import math
import random

import pytest

from lightning_align.stability import SpikeDetector, forecast, median


def noisy(steps, level=2.0, scale=0.02, seed=0):
    draw = random.Random(seed)
    return [level * math.exp(draw.gauss(0, scale)) for _ in range(steps)]


def alarms(detector, losses, norms=None):
    pairs = zip(losses, norms or [None] * len(losses), strict=True)
    verdicts = [detector.update(step, *pair) for step, pair in enumerate(pairs)]
    return [verdict.step for verdict in verdicts if verdict.is_spike]


def test_median_of_odd_and_even_counts():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5


@pytest.mark.parametrize("count", [8, 9, 64])
def test_forecast_goes_on_along_a_straight_line(count):
    assert forecast([5 - 0.25 * step for step in range(count)]) == pytest.approx(5 - 0.25 * count)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_spike_from_the_first_step_on(value):
    assert SpikeDetector().update(0, value).is_spike
    assert SpikeDetector().update(0, 1.0, abs(value)).is_spike


def test_either_signal_alone_is_a_spike():
    losses, norms = noisy(200), noisy(200, level=0.5, scale=0.1, seed=1)
    detector = SpikeDetector()
    assert alarms(detector, losses, norms) == []
    assert detector.update(200, 4.0, 0.5).reason == "loss"
    assert detector.update(201, 2.0, 3.0).reason == "gradient norm"
    assert not detector.update(202, 2.0, 0.5).is_spike


def test_a_state_as_json_goes_on_with_the_same_verdicts():
    losses, norms = noisy(150), noisy(150, level=0.5, scale=0.1, seed=1)
    losses[120] = 5.0
    whole, first, second = SpikeDetector(), SpikeDetector(), SpikeDetector()
    expected = [whole.update(step, losses[step], norms[step]) for step in range(150)]
    for step in range(100):
        first.update(step, losses[step], norms[step])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.update(step, losses[step], norms[step]) for step in range(100, 150)] == (
        expected[100:]
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"window": 7}, "window=7.*at least 8"),
        ({"warmup": 3}, "warmup=3.*at least 4"),
        ({"window": 16, "warmup": 17}, "at most window=16"),
        ({"false_alarms": 0.0}, "between 0 and 0.1"),
        ({"accept_after": 1}, "at least 2"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        SpikeDetector(**arguments)
