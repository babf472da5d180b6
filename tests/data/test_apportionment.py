"""Shares of groups at every moment."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.apportionment import Apportionment, allotted, turns


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_one_more_place_is_one_more_for_one_group(sizes):
    apportionment = Apportionment(np.array(sizes))
    total = sum(sizes)
    counts = apportionment.counts(np.arange(2 * total + 1))
    assert (counts[0] == 0).all()
    steps = np.diff(counts, axis=0)
    assert (steps >= 0).all()
    assert (steps.sum(1) == 1).all()
    assert (counts[total] == sizes).all()
    assert (counts[2 * total] == 2 * np.array(sizes)).all()


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 10**5), min_size=1, max_size=1000),
    st.lists(st.integers(0, 10**15), min_size=1, max_size=5),
)
def test_shares_are_in_proportion_to_within_the_depth_of_the_tree(sizes, places):
    """Exact in whole numbers: Python's, which know no overflow, against ours."""
    counts = Apportionment(np.array(sizes)).counts(np.array(places))
    total, depth = sum(sizes), max(1, (len(sizes) - 1).bit_length())
    for place, row in zip(places, counts.tolist(), strict=True):
        assert sum(row) == place
        for size, count in zip(sizes, row, strict=True):
            assert abs(count * total - size * place) <= depth * total


def edges_of(sizes):
    return np.cumsum(np.array([sizes]), axis=1)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any),
    st.integers(1, 2**32),
    st.data(),
)
def test_what_is_allotted_is_the_share_rounded_and_is_there_at_the_end(sizes, length, data):
    total = sum(sizes)
    draw = data.draw(st.integers(0, total - 1))
    (found,) = allotted(np.array([length]), edges_of(sizes), np.array([draw]))
    assert found.sum() == length
    exact = length % total  # whole rounds are exact
    for size, count in zip(
        sizes, (found - length // total * np.array(sizes)).tolist(), strict=True
    ):
        assert abs(count * total - size * exact) < total * (1 if length < 2**31 else 6)
        assert size or not count
    counts = turns(length, np.array(sizes), found).counts(np.array([length]))
    assert (counts[0] == found).all()


def test_over_all_draws_nobody_gains_by_being_rounded():
    """Of 3 places for 1, 2 and 4 samples, over all 7 draws: 3, 6 and 12 of 21."""
    lengths, edges = np.full(7, 3), np.repeat(edges_of([1, 2, 4]), 7, axis=0)
    assert allotted(lengths, edges, np.arange(7)).sum(0).tolist() == [3, 6, 12]


def test_a_group_of_two_thousand_million_does_not_overflow():
    sizes = [2**31 - 1001, 1000]
    counts = Apportionment(np.array(sizes)).counts(np.array([2**31 - 2, 2**31 - 1]))
    assert counts[1].tolist() == sizes
    assert counts[0].sum() == 2**31 - 2
