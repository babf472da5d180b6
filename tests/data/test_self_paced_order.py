"""The order of samples whose levels begin where that is decided: counted sample by sample."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.eligibility import Levels
from lightning_align.data.feedback import FAR, Decision, SelfPaced
from lightning_align.data.self_paced_order import SelfPacedOrder

CONFIG = {
    "min_difficulty": 1,
    "max_difficulty": 4,
    "schedule_type": "self_paced",
    "schedule_config": {"difficulty_step": 1, "lag": 1000},
}


def an_order(sizes, batch, decisions=(), seed=0, **options):
    scheduler = SelfPaced(CONFIG)
    scheduler.decisions += [Decision(*decision) for decision in decisions]
    steps = [1, *(FAR + level for level in range(1, len(sizes)))]
    levels = Levels(np.arange(sum(sizes)), np.array(sizes), steps)
    return SelfPacedOrder(levels, scheduler, batch, seed, **options)


def batches(order, number):
    return [order.indices(n * order.batch, (n + 1) * order.batch) for n in range(number)]


SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=4)
GAPS = st.lists(st.integers(1, 12), max_size=3)


@settings(max_examples=7, deadline=None)
@given(SIZES, st.integers(1, 20), GAPS, st.integers(0, 2**32))
def test_samples_of_a_group_are_seen_equally_often_or_once_more_after_every_batch(
    sizes, batch, gaps, seed
):
    decisions = [(int(n), level + 1) for level, n in enumerate(np.cumsum(gaps))]
    order = an_order(sizes, batch, decisions, seed)
    edges = np.cumsum([0, *sizes])
    seen = np.zeros(sum(sizes), dtype=int)
    for n, samples in enumerate(batches(order, 30)):
        joined = sum(first <= n for first, _ in [(0, 0), *decisions][: len(sizes)])
        assert len(samples) == batch
        assert max(samples) < edges[joined]
        np.add.at(seen, samples, 1)
        assert all(np.ptp(seen[a:b]) <= 1 for a, b in pairwise(edges))
        counted = np.add.reduceat(seen, edges[:-1])
        if n % 3 == 0:
            assert order.seen((n + 1) * batch).tolist() == counted.tolist()
        if n % 7 == 0:
            assert order.num_unseen((n + 1) * batch) == (seen == 0).sum()


@settings(max_examples=7, deadline=None)
@given(st.permutations([10, 6, 8]), st.integers(0, 9), st.integers(1, 9), st.integers(0, 99))
def test_once_all_have_joined_every_pass_has_each_sample_once(sizes, first, more, seed):
    order = an_order(sizes, 4, [(first, 1), (first + more, 2)], seed)
    stream = order.indices((first + more) * 4, (first + more) * 4 + 3 * 24)
    for begin in range(0, 3 * 24, 24):
        assert sorted(stream[begin : begin + 24]) == list(range(24))


@settings(max_examples=7, deadline=None)
@given(SIZES, st.integers(1, 20), GAPS, st.booleans())
def test_a_decision_changes_nothing_before_it_takes_effect(sizes, batch, gaps, replacement):
    """What the law of resuming rests on: batch n follows from what is decided by n."""
    decisions = [(int(n), level + 1) for level, n in enumerate(np.cumsum(gaps))]
    whole = batches(an_order(sizes, batch, decisions, replacement=replacement), 30)
    for number, (first, _) in enumerate(decisions):
        before = an_order(sizes, batch, decisions[:number], replacement=replacement)
        assert batches(before, first) == whole[:first]


def test_new_ones_join_at_once_in_proportion_to_their_number():
    order = an_order([30, 10], 8, [(5, 1)])
    assert [sum(i >= 30 for i in samples) for samples in batches(order, 8)] == [0] * 5 + [2] * 3
    assert (order.level(39), order.level(40)) == (0, 1)


def test_replacement_draws_all_that_are_eligible_alike():
    order = an_order([50, 50], 20, [(100, 1)], replacement=True)
    drawn = np.bincount(order.indices(0, 2000), minlength=100)
    assert drawn[50:].sum() == 0
    assert np.abs(drawn[:50] - 40).max() < 30  # five standard deviations of 6
    assert order.num_unseen(100 * 20) == 50
    assert order.num_unseen(7) == 100 - len({*order.indices(0, 7)})


def test_a_stretch_within_a_batch_is_part_of_it():
    order = an_order([30, 10], 8)
    whole = order.indices(0, 24)
    assert [order.indices(first, first + 3) for first in range(21)] == [
        whole[first : first + 3] for first in range(21)
    ]


def test_going_back_behind_a_decision_forgets_its_batches():
    order = an_order([3, 30], 8, [(2, 1)])
    with_decision = order.indices(16, 24)
    order.scheduler.decisions.pop()
    assert order.indices(16, 24) != with_decision
    assert max(order.indices(16, 24)) < 3


def test_a_batch_that_is_not_decided_is_refused():
    order = an_order([3, 30], 8)
    with pytest.raises(ValueError, match=r"lag=1000\): batch 1001 is drawn 1001 batches ahead"):
        order.indices(8008, 8016)
