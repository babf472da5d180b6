"""The order under a curriculum, by counting."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data import curriculum_order
from lightning_align.data.curriculum_order import CurriculumOrder
from lightning_align.data.eligibility import Levels

sizes_and_starts = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=6
)
seeds = st.integers(0, 2**63 - 1)
blocks = st.sampled_from([8, 16, 1 << 13])  # so that rounds of many blocks are tried, and the other


def an_order(pairs, seed, *, replacement=False, extra=3):
    """Groups and how long each level lasts; some samples never become eligible."""
    sizes = np.array([size for size, _ in pairs])
    starts = [0, *np.cumsum([length for _, length in pairs[:-1]]).tolist()]
    samples = np.random.default_rng(1).permutation(int(sizes.sum()) + extra)
    levels = Levels(samples, sizes, [1 + start for start in starts])
    return CurriculumOrder(levels, starts, seed, replacement=replacement)


def groups_of(order):
    """The samples of each group."""
    return np.split(order.levels.samples, order.num_eligible)[:-1]


@pytest.fixture(autouse=True)
def _block():
    before = curriculum_order.BLOCK
    yield
    curriculum_order.BLOCK = before


@settings(deadline=None, max_examples=12)
@given(sizes_and_starts, seeds, blocks)
def test_times_seen_differ_by_at_most_one_in_a_group_at_every_moment(pairs, seed, block):
    curriculum_order.BLOCK = block
    order = an_order(pairs, seed)
    seen = np.zeros(len(order.levels.samples), dtype=int)
    end = order.starts[-1] + 100
    for sample in order.indices(0, end):
        seen[sample] += 1
        assert all(np.ptp(seen[group]) <= 1 for group in groups_of(order))
    drawn = order.seen(end)
    assert [seen[group].sum() for group in groups_of(order)] == drawn.tolist()


@settings(deadline=None, max_examples=12)
@given(sizes_and_starts, seeds, blocks)
def test_once_all_are_eligible_every_pass_has_each_sample_once(pairs, seed, block):
    curriculum_order.BLOCK = block
    order = an_order(pairs, seed)
    size, start = int(order.num_eligible[-1]), order.starts[-1]
    for number in range(3):
        seen = order.indices(start + number * size, start + (number + 1) * size)
        assert sorted(seen) == sorted(order.levels.samples[:size])


@settings(deadline=None, max_examples=12)
@given(sizes_and_starts, seeds, blocks)
def test_groups_are_drawn_in_proportion_and_never_before_they_are_eligible(pairs, seed, block):
    """At the ends of blocks to within the depth of the tree, and in between by chance."""
    curriculum_order.BLOCK = block
    order = an_order(pairs, seed)
    groups = groups_of(order)
    for level, (start, end) in enumerate(
        pairwise([*order.starts, order.starts[-1] + 5 * order.num_eligible[-1]])
    ):
        counts = Counter(order.indices(start, end))
        total = int(order.num_eligible[level])
        for number, group in enumerate(groups):
            drawn = sum(counts[sample] for sample in group.tolist())
            share = len(group) / total if number <= level else 0
            assert abs(drawn - share * (end - start)) <= (3 if share else 0)


@settings(deadline=None, max_examples=12)
@given(sizes_and_starts, seeds, blocks, st.booleans(), st.data())
def test_a_stretch_is_the_same_however_it_is_asked_for(pairs, seed, block, replacement, data):
    curriculum_order.BLOCK = block
    whole = an_order(pairs, seed, replacement=replacement).indices(0, 400)
    order = an_order(pairs, seed, replacement=replacement)
    for _ in range(6):
        first, last = sorted((data.draw(st.integers(0, 400)), data.draw(st.integers(0, 400))))
        assert order.indices(first, last) == whole[first:last]


def test_over_many_short_levels_groups_are_seen_in_proportion():
    """500 levels of 7 places, of which most groups get none in most.

    The variance of rounding a share is at most 1/4, and draws of levels are independent: five
    standard deviations over 500 levels are 56, and what a group gets is up to 30 at the most. So
    groups are taken by 50, where the same holds of their sum.
    """
    sizes = np.random.default_rng(2).integers(1, 9, 500)
    order = an_order([(size, 7) for size in sizes], 0)
    ideal = np.zeros(500)
    for level in range(499):
        ideal[: level + 1] += 7 * sizes[: level + 1] / sizes[: level + 1].sum()
    seen = order.seen(order.starts[-1])
    assert seen.sum() == 499 * 7
    apart = (seen - ideal).reshape(10, 50).sum(1)
    assert np.abs(apart).max() < 56
    assert np.abs(seen - ideal).mean() < 2


def test_levels_are_the_same_asked_for_in_any_order():
    pairs = [(3, 9)] * 150
    whole = an_order(pairs, 1)
    counts = [whole.seen(place).tolist() for place in range(0, 9 * 149, 45)]
    order = an_order(pairs, 1)
    for number in [29, 3, 20, 28, 0, 15]:
        assert order.seen(45 * number).tolist() == counts[number]
        assert an_order(pairs, 1).seen(45 * number).tolist() == counts[number]


def test_a_batch_far_ahead_is_looked_up_and_not_replayed():
    order = an_order([(50, 10**6), (30, 10**12), (50, 1)], 0)
    last = order.starts[-1]
    assert len(order.indices(last - 3, last + 3)) == 6
    first, second, third = order.seen(last).tolist()
    assert abs(first - 10**6 - 5 * 10**12 // 8) <= 3
    assert (first + second, third) == (last, 0)


def test_passes_and_seeds_differ():
    passes = [an_order([(40, 1)], seed).indices(0, 80) for seed in (0, 1)]
    assert passes[0][:40] != passes[0][40:] != passes[1][40:] != passes[0][:40] != passes[1][:40]


def test_where_a_sample_comes_in_a_round_is_even():
    """Of two groups of two, the first begun: five standard deviations of 200 in 4 places are 31.

    Of the group that was begun the other sample comes before the one that was seen; the new ones
    may come anywhere.
    """
    orders = [an_order([(2, 1), (2, 1)], seed, extra=0) for seed in range(200)]
    rounds = [order.indices(1, 5) for order in orders]
    old, new = np.split(orders[0].levels.samples, 2)
    places = np.array([[round_.index(sample) for sample in new] for round_ in rounds])
    for column in places.T:
        assert np.abs(np.bincount(column, minlength=4) - 50).max() < 31
    for order, round_ in zip(orders, rounds, strict=True):
        (seen,) = order.indices(0, 1)
        (other,) = set(old.tolist()) - {seen}
        assert round_.index(other) < round_.index(seen)


def test_with_replacement_every_eligible_sample_is_equally_likely():
    """40000 draws of 4, then of 8; five standard deviations are 433 and 331."""
    order = an_order([(4, 40000), (4, 1)], 0, replacement=True)
    samples = order.levels.samples
    for level, size, spread in ((0, 4, 433), (1, 8, 331)):
        counts = Counter(order.indices(level * 40000, level * 40000 + 40000))
        assert sorted(counts) == sorted(samples[:size])
        assert max(abs(count - 40000 / size) for count in counts.values()) < spread


@pytest.mark.parametrize("replacement", [False, True])
def test_what_was_never_drawn_is_counted(replacement):
    order = an_order([(30, 20), (50, 40)], 3, replacement=replacement)
    for place in (0, 1, 19, 20, 55, 95):
        drawn = set(order.indices(0, place))
        assert order.num_unseen(place) == 80 - len(drawn)
    assert order.levels.never_eligible == 3


def test_the_stream_of_a_seed_never_changes():
    """A checkpoint of an older version goes on with the batches that it would have seen."""
    found = an_order([(5, 6), (4, 9), (3, 5), (2, 1)], 5).indices(0, 34)
    assert found[:12] == [10, 14, 1, 15, 7, 7, 10, 3, 12, 1, 5, 4]
    assert found[12:24] == [14, 15, 7, 0, 14, 12, 1, 5, 10, 3, 16, 15]
    assert found[24:] == [14, 2, 4, 7, 9, 8, 5, 0, 12, 1]
