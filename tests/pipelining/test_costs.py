"""Costs from a real run's timeline."""

import pytest

from lightning_align.pipelining import Event, measured_costs, simulate


def test_costs_of_a_simulated_timeline_are_those_it_was_made_with() -> None:
    costs = {"forward_cost": [1.0, 3.0], "backward_cost": [2.0, 5.0]}
    assert measured_costs(simulate("1F1B", 2, 4, **costs).events) == costs


def test_the_two_halves_of_a_backward_are_told_apart() -> None:
    costs = {
        "forward_cost": [1.0] * 4,
        "backward_cost": [3.0, 3.0, 4.0, 5.0],
        "weight_cost": [1.0, 2.0, 1.0, 2.0],
    }
    assert measured_costs(simulate("ZBVZeroBubble", 2, 4, **costs).events) == costs


def test_one_slow_action_does_not_count() -> None:
    events = [Event(0, "F", 0, i, 0.0, 1.0 if i else 50.0) for i in range(5)]
    events += [Event(0, "B", 0, i, 0.0, 2.0) for i in range(5)]
    assert measured_costs(events) == {"forward_cost": [1.0], "backward_cost": [2.0]}


def test_a_stage_without_events_is_named() -> None:
    events = simulate("1F1B", 2, 4).events
    with pytest.raises(ValueError, match="stage 0 has no forward or no backward among them"):
        measured_costs([event for event in events if event.rank == 1])
