"""What time goes to, by a clock that is told."""

import time
from typing import Any

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_align._compat.torch_messages import MessageClock
from lightning_align.callbacks.step_clock import PARTS, StepClock

NOTHING = dict.fromkeys(PARTS, 0.0)


class Waits(SingleDeviceStrategy):
    """A strategy that tells how long it has waited."""

    waited_s = 0.0


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    at = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: at[0])
    return at


def entered(clock: StepClock, now: list[float], *parts: tuple[Any, float]) -> None:
    """A step that counts: parts one after the other, for so many seconds."""
    for part, seconds in parts:
        clock.enter(part)
        now[0] += seconds
    clock.enter(None)
    clock.count()


def test_seconds_go_to_what_runs(now: list[float]) -> None:
    clock = StepClock(SingleDeviceStrategy("cpu"))
    entered(clock, now, ("forward", 1), ("backward", 2), (None, 50), ("forward", 1), ("data", 4))
    assert clock.seconds == 8
    assert clock.split["forward"] == 2
    assert clock.shares() == {**NOTHING, "data": 0.5, "forward": 0.25, "backward": 0.25}
    clock.forget()
    assert clock.seconds == 0
    assert clock.shares() == {}


def test_what_a_strategy_has_waited_is_a_part_of_its_own(now: list[float]) -> None:
    strategy = Waits("cpu")
    clock = StepClock(strategy)
    clock.enter("forward")
    now[0], strategy.waited_s = 5, 3
    clock.enter("backward")
    now[0] = 6
    clock.enter(None)
    clock.count()
    assert clock.split == {**NOTHING, "forward": 2, "backward": 1, "waiting": 3}


class Commits(Waits):
    """One that keeps steps, too."""

    committing_s = 0.0


def test_commits_are_a_part_of_their_own_and_waits_in_them_are_not(now: list[float]) -> None:
    strategy = Commits("cpu")
    clock = StepClock(strategy)
    clock.enter("other")
    now[0], strategy.waited_s, strategy.committing_s = 10, 3, 4
    clock.enter("forward")
    now[0] = 11
    clock.enter(None)
    clock.count()
    assert clock.split == {**NOTHING, "other": 3, "forward": 1, "waiting": 3, "commit": 4}


class Both(SingleDeviceStrategy):
    """Whose training step runs backward, too, and waits."""

    waited_s = backward_s = 0.0


def test_backward_within_the_training_step_is_told_apart(now: list[float]) -> None:
    strategy = Both("cpu")
    clock = StepClock(strategy)
    clock.enter("forward")
    now[0], strategy.waited_s, strategy.backward_s = 10, 3, 4
    clock.enter("optimizer")
    now[0] = 11
    clock.enter(None)
    clock.count()
    assert clock.split == {**NOTHING, "forward": 3, "backward": 4, "optimizer": 1, "waiting": 3}


def test_parts_that_are_not_told_apart_count_all_the_same(now: list[float]) -> None:
    clock = StepClock(SingleDeviceStrategy("cpu"))
    clock.splits = False
    entered(clock, now, ("forward", 1), ("backward", 2))
    assert clock.seconds == 3
    assert clock.shares() == {}


def test_a_step_that_is_left_out_counts_for_nothing(now: list[float]) -> None:
    """Nor what led to it."""
    clock = StepClock(SingleDeviceStrategy("cpu"))
    entered(clock, now, ("forward", 1))
    clock.enter("data")
    now[0] += 7
    clock.enter("forward")
    now[0] += 7
    clock.enter(None)
    clock.leave_out()
    entered(clock, now, ("backward", 2))
    assert clock.seconds == 3
    assert clock.split == {**NOTHING, "forward": 1, "backward": 2}


def test_messages_of_a_sharded_model_are_a_part_of_their_own(now: list[float]) -> None:
    messages = MessageClock([])
    clock = StepClock(SingleDeviceStrategy("cpu"), messages)
    clock.enter("forward")
    now[0], messages.seconds = 5, 2
    clock.enter("backward")
    now[0], messages.seconds = 8, 100  # never more than the time that has gone by
    clock.enter(None)
    clock.count()
    assert clock.split == {**NOTHING, "forward": 3, "communication": 5}
