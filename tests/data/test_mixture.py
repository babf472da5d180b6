import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_align.data.mixture import Mixture, largest_remainder
from lightning_align.data.sampler import PositionSampler

seeds = st.integers(0, 2**63 - 1)


@st.composite
def mixtures(draw):
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    weights = st.floats(1e-3, 1e3) | st.integers(1, 9)
    weights = draw(st.lists(weights, min_size=len(sizes), max_size=len(sizes)))
    assume(0 not in largest_remainder(sum(sizes), weights))
    return Mixture(sizes, weights)


def corpus_of(mixture, samples):
    return np.searchsorted(np.cumsum(mixture.sizes), samples, side="right")


def test_worked_shares():
    """Ten samples by 5 : 3 : 1 are 5.56, 3.33 and 1.11: the one left over goes to the first."""
    assert largest_remainder(10, [5, 3, 1]) == [6, 3, 1]
    assert largest_remainder(10, [0.7, 0.3]) == [7, 3]
    assert largest_remainder(3, [1, 1]) == [2, 1], "of equal remainders the first wins"
    assert Mixture([100, 300], [1, 1]).shares == [200, 200]


@pytest.mark.parametrize("factor", [1e308, 1e-300])
def test_only_the_ratios_of_weights_matter(factor):
    """1e308 three times is more than a float holds, and three times 1e-300 its square is 0."""
    assert Mixture([50, 50, 50], [factor, factor, factor]).shares == [50, 50, 50]
    assert largest_remainder(10, [0.5 * factor, 0.3 * factor, 0.1 * factor]) == [6, 3, 1]


@settings(deadline=None)
@given(
    st.integers(0, 10**6), st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8), st.floats(0.1, 9)
)
def test_shares_are_exact_to_one_sample(total, weights, factor):
    shares = largest_remainder(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / math.fsum(weights)) < 1 + 1e-6
    scaled = largest_remainder(total, [factor * weight for weight in weights])
    assert max(abs(a - b) for a, b in zip(shares, scaled, strict=True)) <= 1


@settings(deadline=None)
@given(mixtures(), seeds, st.integers(0, 20))
def test_a_pass_has_the_shares(mixture, seed, pass_number):
    samples = mixture.samples(seed, pass_number)
    counts = np.bincount(corpus_of(mixture, samples), minlength=len(mixture.sizes))
    assert counts.tolist() == mixture.shares
    assert len(samples) == sum(mixture.sizes)


@settings(deadline=None)
@given(mixtures(), seeds)
def test_each_sample_comes_once_before_one_of_its_corpus_comes_again(mixture, seed):
    stream = np.concatenate([mixture.samples(seed, n) for n in range(5)])
    for corpus, size in enumerate(mixture.sizes):
        own = stream[corpus_of(mixture, stream) == corpus].tolist()
        for begin in range(0, len(own) - size + 1, size):
            assert len(set(own[begin : begin + size])) == size
        seen = Counter(own)
        assert len(own) < size or max(seen.values()) - min(seen.values()) <= 1


@settings(deadline=None)
@given(mixtures(), seeds, st.integers(1, 5), st.integers(1, 4), st.integers(0, 2))
def test_ranks_share_the_batches_of_a_mixture(mixture, seed, batch_size, world, k):
    total = sum(mixture.sizes)
    samplers = [
        PositionSampler(
            total, batch_size, seed=seed, num_replicas=world, rank=rank, mixture=mixture
        )
        for rank in range(world)
    ]
    window = range(k * len(samplers[0]), (k + 1) * len(samplers[0]))
    seen = [i for n in window for sampler in samplers for i in sampler.batch(n) if i >= 0]
    assert sorted(seen) == sorted(mixture.samples(seed, k).tolist())
    whole = PositionSampler(total, batch_size * world, seed=seed, mixture=mixture)
    parts = [i for sampler in samplers for i in sampler.batch(window[-1]) if i >= 0]
    assert parts == whole.batch(window[-1])


@settings(deadline=None)
@given(mixtures(), seeds, st.integers(0, 60))
def test_resume_is_the_tail_of_the_uninterrupted_stream(mixture, seed, p):
    def stream(start):
        position = start
        sampler = PositionSampler(
            sum(mixture.sizes), 3, seed=seed, mixture=mixture, position=lambda: position
        )
        while True:
            for batch in sampler:
                yield batch
                position += 1

    assert list(itertools.islice(stream(0), p, p + 20)) == list(itertools.islice(stream(p), 20))


def test_corpora_are_interleaved_and_not_one_after_the_other():
    mixture = Mixture([100, 100], [1, 1])
    first = PositionSampler(200, 100, mixture=mixture).batch(0)
    assert 30 < np.bincount(corpus_of(mixture, first))[0] < 70


def test_corpora_of_one_size_have_orders_of_their_own():
    samples = Mixture([50, 50], [1, 1]).samples(0, 0)
    assert not np.array_equal(samples[:50], samples[50:] - 50)


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([3, 3], [1.0], r"Mixture\(weights=\[1\.0\]\): must be as many as there are corpora, 2"),
        ([3, 3], [1, 0], r"Mixture\(weights=0\): a weight must be a positive, finite number"),
        ([3, 3], [1, -2.5], r"Mixture\(weights=-2\.5\): a weight must be"),
        ([3, 3], [1, math.nan], r"Mixture\(weights=nan\): a weight must be"),
        ([3, 3], [10**400, 1], r"Mixture\(weights=10+\): a weight must be"),
        ([3, 3], [10**5000, 1], r"Mixture\(weights=<int: .*digits.*>\): a weight must be"),
        ([3, 3], [math.inf, 1], r"Mixture\(weights=inf\): a weight must be"),
        ([3, 3], ["1", 1], r"Mixture\(weights='1'\): a weight must be"),
        ([3, 3], [True, 1], r"Mixture\(weights=True\): a weight must be"),
        ([3, 3], [1, 1e-3], r"Mixture\(weights=0\.001\): gives its corpus not one of the 6 sam"),
    ],
)
def test_refuses(sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(sizes, weights)


def test_the_sampler_refuses_a_mixture_of_other_samples_or_without_an_order():
    mixture = Mixture([3, 3], [1, 2])
    with pytest.raises(ValueError, match=r"PositionSampler\(num_samples=5\): .* corpora, 6"):
        PositionSampler(5, 2, mixture=mixture)
    with pytest.raises(ValueError, match=r"PositionSampler\(shuffle=False\): a mixture must be sh"):
        PositionSampler(6, 2, mixture=mixture, shuffle=False)
