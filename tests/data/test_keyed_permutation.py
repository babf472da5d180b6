"""Permutations by key: each is one, and over many keys each is as likely as another."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.keyed_permutation import SMALL, keys, permuted


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_every_place_lands_once(size, seed):
    landed = permuted(np.arange(size), np.full(size, size), np.repeat(keys(seed, 1), size))
    assert sorted(landed) == list(range(size))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2**31), st.integers(0, 9)), min_size=1, max_size=20))
def test_permutations_of_all_sizes_are_looked_up_at_once(pairs):
    sizes, chosen = np.array(pairs).T
    places, key = (sizes - 1) // 2, keys(7, chosen)
    together = permuted(places, sizes, key)
    alone = [permuted(places[[i]], sizes[[i]], key[[i]])[0] for i in range(len(pairs))]
    assert together.tolist() == alone
    assert (together < sizes).all()


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_permutation_is_equally_likely(size):
    """Chi-square over 200 keys a permutation, within five standard deviations of its mean."""
    every = [*permutations(range(size))]
    key = keys(1, np.arange(200 * len(every)))
    columns = [permuted(np.full(len(key), i), np.full(len(key), size), key) for i in range(size)]
    found = Counter(zip(*map(np.ndarray.tolist, columns), strict=True))
    chi_square = sum((found[permutation] - 200) ** 2 / 200 for permutation in every)
    degrees = len(every) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("size", [16, 37, SMALL, SMALL + 1])
def test_neighbours_land_anywhere(size):
    """Where a place lands, and how far from its neighbour: chi-square as above."""
    key = keys(2, np.arange(20 * size))
    first, second = (permuted(np.full(len(key), i), np.full(len(key), size), key) for i in (0, 1))
    apart = (second - first) % size
    assert apart.all()
    for found, bins in ((first, size), (second, size), (apart - 1, size - 1)):
        expected = len(key) / bins
        chi_square = ((np.bincount(found, minlength=bins) - expected) ** 2 / expected).sum()
        assert chi_square < bins - 1 + 5 * (2 * (bins - 1)) ** 0.5


@pytest.mark.parametrize("place", [-1, 5, 2**32])
def test_refuses_a_place_outside_of_its_size(place):
    """Such a place may be sent through without end."""
    with pytest.raises(ValueError, match=r"must be in \[0, size\)"):
        permuted(np.array([0, place]), np.array([5, 5]), keys(0, np.zeros(2, dtype=int)))


def test_keys_depend_on_every_part_and_on_their_order():
    found = {
        keys(*parts)[0]
        for parts in ((0, 0), (0, 0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0), (2**64 - 1, 1, 0))
    }
    assert len(found) == 7


def test_what_a_key_means_never_changes():
    """A checkpoint of an older version goes on with the batches that it would have seen."""
    size = np.array([5, 5, 5, 5, 5, 10**8, 2**31])
    landed = permuted(np.array([0, 1, 2, 3, 4, 77, 2**30]), size, keys(3, np.full(7, 4)))
    assert landed.tolist() == [3, 2, 1, 0, 4, 64145140, 240016110]
