"""Self-paced pacing: the rule, and that a run cut anywhere makes the same decisions."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_align.data.feedback import (
    FAR,
    Decision,
    SelfPaced,
    check_lag,
    has_flattened,
    scheduler_of,
)
from lightning_align.data.pacing import CurriculumScheduler

CONFIG = {"min_difficulty": 8, "max_difficulty": 32, "schedule_type": "self_paced"}
SCHEDULE = {"difficulty_step": 8, "window": 3, "threshold": 0.1, "patience": 0, "lag": 4}


def paced(**options):
    return SelfPaced({**CONFIG, "schedule_config": {**SCHEDULE, **options}})


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.1, 10), max_size=20), st.floats(0, 0.5), st.integers(0, 3))
def test_the_rule_is_that_of_reduce_lr_on_plateau(means, threshold, patience):
    parameter = torch.nn.Parameter(torch.zeros(()))
    theirs = ReduceLROnPlateau(
        torch.optim.SGD([parameter], lr=1.0), patience=patience, threshold=threshold
    )
    first = None
    for number, mean in enumerate(means):
        theirs.step(mean)
        if first is None and theirs.get_last_lr() != [1.0]:
            first = number
    ours = [has_flattened(means[: number + 1], threshold, patience) for number in range(len(means))]
    assert (ours.index(True) if True in ours else None) == first


def test_a_loss_below_zero_falls_as_well():
    assert not has_flattened([-1.0, -1.2, -1.5], 0.1, 0)
    assert has_flattened([-1.0, -1.05], 0.1, 0)


def test_a_decision_takes_effect_a_lag_after_it_is_taken():
    """Blocks of 3: the second mean is no better, so batch 5's loss decides, for 6 + 4."""
    scheduler = paced()
    taken = [scheduler.observe(n + 1, 2.0) for n in range(6)]
    assert taken == [None] * 5 + [Decision(10, 1)]
    assert [scheduler.get_difficulty(n + 1) for n in (0, 9, 10, 1000)] == [8, 8, 16, 16]
    # What is trained until then is of the level that is over, whatever it is.
    assert [scheduler.observe(n + 1, 100.0) for n in range(6, 10)] == [None] * 4
    taken = [scheduler.observe(n + 1, 3.0) for n in range(10, 16)]
    assert taken == [None] * 5 + [Decision(20, 2)]
    assert [*scheduler.changes()] == [(1, 8), (11, 16), (21, 24), (FAR + 3, 32)]


def test_a_loss_that_falls_keeps_its_level_and_one_that_is_no_number_is_left_out():
    scheduler = paced()
    losses = [0.8**n for n in range(30)]
    assert all(scheduler.observe(n + 1, loss) is None for n, loss in enumerate(losses))
    scheduler = paced()
    assert [scheduler.observe(n + 1, math.nan) for n in range(20)] == [None] * 20
    assert scheduler.state_dict()["losses"] == []


def test_the_last_level_is_the_last():
    scheduler = paced(window=1, lag=1)
    for n in range(50):
        scheduler.observe(n + 1, 1.0)
    assert [decision.level for decision in scheduler.decisions] == [0, 1, 2, 3]
    assert scheduler.get_difficulty(51) == 32


def loss_of(n, level):
    """Falls in every level, with some noise, and is another in each."""
    return 1 + 0.2 * level + 0.7 ** (n % 17) + 0.05 * math.sin(7 * n)


def run(scheduler, first, last):
    """Train batches, as a callback does; returns the difficulty of each."""
    found = []
    for n in range(first, last):
        found.append(scheduler.get_difficulty(n + 1))
        scheduler.observe(n + 1, loss_of(n, scheduler.level(n)))
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 120), max_size=6), st.integers(1, 9), st.integers(1, 5))
def test_any_split_of_a_run_into_resumes_has_the_same_levels(cuts, lag, window):
    options = {"lag": lag, "window": window}
    whole = paced(**options)
    levels = run(whole, 0, 120)
    found, state = [], paced(**options).state_dict()
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 120], strict=True):
        part = paced(**options)
        part.load_state_dict(json.loads(json.dumps(state)))
        found += run(part, first, last)
        state = part.state_dict()
    assert found == levels
    assert state == whole.state_dict()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 9))
def test_what_is_drawn_ahead_by_no_more_than_the_lag_is_decided(lag, ahead):
    """Levels as they are when batch n is drawn are those that hold when it is trained."""
    scheduler, drawn = paced(lag=lag, window=2), []
    for n in range(120):
        while len(drawn) <= n + min(ahead, lag):
            scheduler.check_decided(len(drawn))
            drawn.append(scheduler.get_difficulty(len(drawn) + 1))
        assert drawn[n] == scheduler.get_difficulty(n + 1)
        scheduler.observe(n + 1, loss_of(n, scheduler.level(n)))
    assert len({*drawn}) > 2


def test_what_is_drawn_further_ahead_is_refused():
    scheduler = paced(lag=4)
    scheduler.observe(10)
    scheduler.check_decided(14)
    with pytest.raises(ValueError, match=r"lag=4\): batch 15 is drawn 5 .* Set it to 5 or more"):
        scheduler.check_decided(15)


def test_a_lag_shorter_than_what_loaders_draw_ahead_is_refused():
    check_lag(1, 0, None)
    check_lag(9, 4, 2)
    with pytest.raises(ValueError, match=r"lag=8\): 4 workers .* up to 9 .* Set it to 9 or more"):
        check_lag(8, 4, 2)
    with pytest.raises(ValueError, match="up to 5 batches"):
        check_lag(4, 2, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, r"window=4\): the checkpoint was written with 3"),
        ({"lag": 5}, r"lag=5\): the checkpoint was written with 4"),
        (
            {"difficulty_step": 4},
            r"levels=\[8, 12, .*\]\): the checkpoint was written with \[8, 16",
        ),
    ],
)
def test_refuses_the_state_of_another_rule(options, message):
    with pytest.raises(ValueError, match=message):
        paced(**options).load_state_dict(paced().state_dict())


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"window": 0}, r"window=0\): must be at least 1"),
        ({}, {"lag": 0}, r"lag=0\): must be at least 1"),
        ({}, {"lag": 2.5}, r"lag=2.5\): must be a whole number"),
        ({}, {"patience": -1}, r"patience=-1\): must be at least 0"),
        ({}, {"threshold": math.nan}, r"threshold=nan\): must be in \[0, 1\)"),
        ({}, {"total_curriculum_step": 9}, "does not know total_curriculum_step"),
        ({}, {"difficulty": [8, 32]}, "needs one of difficulty_step and difficulty"),
        ({}, {"difficulty_step": 0}, r"difficulty_step=0\): must be positive"),
        ({}, {"difficulty_step": None, "difficulty": [8, 64]}, "end at max_difficulty, 32"),
        ({}, {"difficulty_step": None, "difficulty": [8, 40, 32]}, "finite numbers that rise"),
        ({"max_difficulty": math.inf}, {}, r"max_difficulty=inf\): must be a finite number"),
        ({"max_difficulty": 8}, {}, "must be finite numbers that rise"),
        ({}, {"difficulty_step": 0.01}, "must have 2 to 1000 levels, and has 2401"),
        ({"schedule_type": "fixed_linear"}, {}, "must be 'self_paced'"),
    ],
)
def test_refuses(config, options, message):
    with pytest.raises(ValueError, match=message):
        SelfPaced({**CONFIG, **config, "schedule_config": {**SCHEDULE, **options}})


def test_the_scheduler_of_a_configuration():
    ours = {**CONFIG, "schedule_config": SCHEDULE}
    scheduler = scheduler_of(ours)
    assert isinstance(scheduler, SelfPaced)
    assert scheduler_of(scheduler) is scheduler
    linear = {"total_curriculum_step": 9, "difficulty_step": 1}
    other = scheduler_of({**CONFIG, "schedule_type": "fixed_linear", "schedule_config": linear})
    assert isinstance(other, CurriculumScheduler)
    assert scheduler_of(other) is other


def test_what_was_decided_is_no_part_of_the_undecided():
    scheduler = paced(window=1, lag=1)
    for n in range(9):
        scheduler.observe(n + 1, 1.0)
    assert scheduler.undecided().decisions == [Decision(0, 0)]
    assert scheduler.undecided().rule() == scheduler.rule()


def test_needs_both_ends():
    with pytest.raises(ValueError, match="needs max_difficulty"):
        SelfPaced({"min_difficulty": 8})


def test_a_list_of_difficulties_and_a_least_one_that_is_no_multiple():
    assert paced(difficulty_step=None, difficulty=[8, 9, 32]).levels == [8, 9, 32]
    assert SelfPaced(
        {"min_difficulty": 10, "max_difficulty": 30, "schedule_config": {"difficulty_step": 8}}
    ).levels == [10, 16, 24, 30]
