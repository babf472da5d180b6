"""Time to train with failures: the papers' figures, a simulation, and what is impossible."""

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.planner.failures import (
    Reliability,
    TimeToTrain,
    daly_interval,
    time_to_train,
    young_interval,
)

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


@pytest.mark.parametrize(("mtbf_s", "minutes"), [(24 * HOUR, 117), (6 * HOUR, 57), (900, 9.1)])
def test_intervals_of_dalys_figures(mtbf_s: float, minutes: float) -> None:
    """Figures 3 to 5 of Daly 2006: dumps of 5 minutes, failures each 24 h, 6 h and 15 min."""
    found = daly_interval(5 * MINUTE, mtbf_s) / MINUTE
    assert found == pytest.approx(minutes, abs=0.5 if minutes > 10 else 0.05)


def test_young_is_the_first_order_of_it() -> None:
    """sqrt(2 x 8 x 100) = 40."""
    assert young_interval(8, 100) == pytest.approx(40)
    assert daly_interval(1e-6, 1e6) == pytest.approx(young_interval(1e-6, 1e6), rel=1e-6)
    assert daly_interval(200, 100) == 100  # saving takes twice as long as nothing fails


@pytest.mark.parametrize(("checkpoint_s", "within"), [(1.0, 1e-8), (300.0, 1e-5), (3000.0, 2e-3)])
def test_no_interval_is_much_better_than_dalys(checkpoint_s: float, within: float) -> None:
    """Failures each 10,000 s; a year of work, which no interval divides by much."""
    known = {"mtbf_s": 1e4, "checkpoint_s": checkpoint_s, "restart_s": 60.0}
    best = daly_interval(checkpoint_s, 1e4)
    ours = time_to_train(3e7, **known, interval_s=best).seconds
    others = [
        time_to_train(3e7, **known, interval_s=best * 1.01**power).seconds
        for power in range(-150, 151)
    ]
    assert ours <= min(others) * (1 + within)
    young = young_interval(checkpoint_s, 1e4)
    assert ours <= time_to_train(3e7, **known, interval_s=young).seconds


def test_worked_example() -> None:
    """Two intervals of M ln 2 with their checkpoints and restarts of M ln 2: 2 x M x 2 (2 - 1)."""
    mtbf = 1000.0
    half = mtbf * math.log(2)
    found = time_to_train(
        2 * (half - 100), mtbf_s=mtbf, checkpoint_s=100, restart_s=half, interval_s=half - 100
    )
    assert found.seconds == pytest.approx(4 * mtbf)
    assert found.failures == pytest.approx(4)
    assert found.checkpoints_s == pytest.approx(200)
    assert found.restarts_s == pytest.approx(2 * mtbf)  # each ends half of the time by itself
    assert found.lost_s == pytest.approx(2 * mtbf - 2 * half)


def simulated(
    work_s: float,
    mtbf_s: float,
    checkpoint_s: float,
    restart_s: float,
    interval_s: float,
    seed: int,
) -> tuple[float, float, float]:
    """Seconds, those of restarts, and failures of one run, event by event."""
    until = random.Random(seed)
    clock = restarts = done = 0.0
    failures = 0
    fails = until.expovariate(1 / mtbf_s)
    while done < work_s * (1 - 1e-12):
        work = min(interval_s, work_s - done)
        if clock + work + checkpoint_s <= fails:
            clock += work + checkpoint_s
            done += work
            continue
        while True:  # a failure, and perhaps others before the run goes on
            failures += 1
            clock, fails = fails, fails + until.expovariate(1 / mtbf_s)
            restarts += min(restart_s, fails - clock)
            if clock + restart_s <= fails:
                clock += restart_s
                break
    return clock, restarts, failures


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    checkpoint=st.floats(0.01, 1.0),
    restart=st.floats(0.0, 1.0),
    interval=st.floats(0.1, 2.0),
    intervals=st.floats(0.3, 6.0),
    seed=st.integers(0, 2**32),
)
def test_a_simulation_of_failures_takes_as_long(
    checkpoint: float, restart: float, interval: float, intervals: float, seed: int
) -> None:
    """Times are in units of the mean time between failures; 400 runs, within 5 standard errors."""
    given_s = (intervals * interval, 1.0, checkpoint, restart, interval)
    runs = [simulated(*given_s, seed=seed + number) for number in range(400)]
    work, mtbf, *_ = given_s
    ours = time_to_train(
        work, mtbf_s=mtbf, checkpoint_s=checkpoint, restart_s=restart, interval_s=interval
    )
    expected = (ours.seconds, ours.restarts_s, ours.failures)
    for place, mean in enumerate(expected):
        found = [run[place] for run in runs]
        average = sum(found) / len(found)
        variance = sum((each - average) ** 2 for each in found) / (len(found) - 1)
        assert abs(average - mean) <= 5 * math.sqrt(variance / len(found)) + 1e-9


@given(
    work=st.floats(1.0, 1e8),
    mtbf=st.floats(100.0, 1e9),
    checkpoint=st.floats(0.1, 100.0),
    restart=st.floats(0.0, 100.0),
)
@settings(max_examples=50, deadline=None)
def test_parts_add_up_and_fewer_failures_take_less(
    work: float, mtbf: float, checkpoint: float, restart: float
) -> None:
    known = {"checkpoint_s": checkpoint, "restart_s": restart}
    found = time_to_train(work, mtbf_s=mtbf, **known)
    parts = (found.work_s, found.checkpoints_s, found.lost_s, found.restarts_s)
    assert all(part >= 0 for part in parts)
    assert sum(parts) == found.seconds >= work + checkpoint
    assert 0 < found.goodput < 1
    rarely = time_to_train(work, mtbf_s=4 * mtbf, **known, interval_s=found.interval_s)
    assert rarely.seconds <= found.seconds * (1 + 1e-9)


def test_failures_of_llama_3() -> None:
    """arXiv:2407.21783, 3.3.4: 419 unexpected interruptions in 54 days on 16,384 devices.

    That is one each 3.1 hours, and a device that lasts 5.8 years; more than 90 % were effective.
    """
    mtbf_s = 54 * DAY * 16384 / 419
    assert mtbf_s / (365.25 * DAY) == pytest.approx(5.78, abs=0.01)
    run = Reliability(mtbf_s, "1min", "10min")
    found = run.time_to_train(50 * DAY, devices=16384)
    assert found.seconds / found.failures == pytest.approx(3.09 * HOUR, rel=0.01)
    assert 0.84 < found.goodput < 0.90
    faster = Reliability(mtbf_s, "5s", "5min").time_to_train(50 * DAY, devices=16384)
    assert 0.94 < faster.goodput < 0.97


def test_ten_thousand_devices() -> None:
    """By hand: M = 5 y / 10,000 = 4.38 h; sqrt(2 x 60 s x M) = 22.9 min, Daly a bit less.

    Losses to first order: checkpoint / interval + (interval / 2 + restart) / M.
    """
    found = Reliability("5y").time_to_train(30 * DAY, devices=10_000)
    assert found.interval_s / MINUTE == pytest.approx(22.9 - 0.8, abs=0.2)
    first_order = 60 / found.interval_s + (found.interval_s / 2 + 600) / (4.383 * HOUR)
    assert found.seconds / found.work_s - 1 == pytest.approx(first_order, rel=0.1)
    few = Reliability("5y").time_to_train(30 * DAY, devices=8)
    assert few.goodput > 0.99 > found.goodput


def test_times_have_units() -> None:
    days = Reliability("3650d", "0.5min", "0s", "1h").time_to_train(1e6, devices=100)
    bare = time_to_train(1e6, mtbf_s=36.5 * DAY, checkpoint_s=30, restart_s=0, interval_s=3600)
    assert isinstance(days, TimeToTrain)
    assert days == bare


@pytest.mark.parametrize(
    ("given_s", "told"),
    [
        ({"mtbf_s": 0}, r"mtbf_s=0\): must be positive, in seconds"),
        ({"mtbf_s": math.inf}, "mtbf_s=inf.*finite number of seconds"),
        ({"checkpoint_s": 0}, r"checkpoint_s=0\): must be positive"),
        ({"restart_s": -1}, r"restart_s=-1\): must be at least 0"),
        ({"interval_s": math.nan}, "interval_s=nan"),
        ({"mtbf_s": 1.0, "interval_s": 900.0}, "15.2 min without a failure.*every 1 s.*Save more"),
    ],
)
def test_what_is_no_time_or_never_ends(given_s: dict[str, Any], told: str) -> None:
    known = {"mtbf_s": 1e5, "checkpoint_s": 10.0, "restart_s": 0.0, **given_s}
    with pytest.raises(ValueError, match=told):
        time_to_train(1e6, **known)


def test_bad_texts() -> None:
    with pytest.raises(ValueError, match=r"Reliability\(mtbf='5 years'\).*'30min'"):
        Reliability("5 years")
    with pytest.raises(ValueError, match=r"checkpoint_interval='0s'.*positive"):
        Reliability("5y", checkpoint_interval="0s")
    with pytest.raises(ValueError, match="devices=0"):
        Reliability("5y").time_to_train(1.0, devices=0)
