"""Mixtures whose weights change with time, by counting."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.batch_sizes import BatchSizes
from lightning_align.data.mixture_schedule import PARTS, MixtureSchedule
from lightning_align.data.sampler import PositionSampler

SIZES = [30, 7, 60]


@st.composite
def schedules(draw):
    gaps = draw(st.lists(st.integers(1, 40), max_size=3))
    row = st.lists(st.sampled_from([0, 1, 2, 0.3]), min_size=3, max_size=3).filter(any)
    weights = draw(st.lists(row, min_size=len(gaps) + 1, max_size=len(gaps) + 1))
    steps = [sum(gaps[:i]) for i in range(len(weights))]
    return MixtureSchedule(SIZES, weights, steps, interpolate=draw(st.booleans()))


def corpora_of(samples):
    return np.searchsorted(np.cumsum(SIZES), samples, side="right")


def a_sampler(schedule, **options):
    return PositionSampler(
        sum(SIZES), **{"batch_size": 8, "seed": 3, "mixture": schedule} | options
    )


@settings(deadline=None, max_examples=25)
@given(schedules(), st.booleans())
def test_counts_are_exact_at_every_place_and_those_of_the_weights(schedule, growing):
    """Each phase is off by less than one for being rounded, and the last by the depth of the tree.

    Which is 2 for three corpora, in places that are allotted, which are off by one for themselves.
    """
    sizes = BatchSizes([(0, 2), (9, 8)]) if growing else None
    sampler = a_sampler(schedule, batch_sizes=sizes)
    seen, ideal, place, phases = np.zeros(3, dtype=int), np.zeros(3), 0, 1
    for n in range(110):
        weights = schedule.weights_at(n)
        phases += weights != schedule.weights_at(max(0, n - 1))
        for corpus in corpora_of(sampler.batch(n)):
            assert weights[corpus] > 0, "a corpus without weight has no sample"
            assert sampler.order.counts(place) == seen.tolist()
            seen[corpus] += 1
            ideal += weights
            place += 1
            assert np.abs(seen - ideal).max() < phases + 2
        assert place == sampler.before(n + 1)


@settings(deadline=None, max_examples=20)
@given(schedules())
def test_each_sample_of_a_corpus_comes_once_before_one_comes_again(schedule):
    samples = a_sampler(schedule).order.indices(0, 1200)
    for corpus in range(3):
        stream = [sample for sample in samples if corpora_of(sample) == corpus]
        for first in range(0, len(stream) - SIZES[corpus], SIZES[corpus]):
            assert len({*stream[first : first + SIZES[corpus]]}) == SIZES[corpus]


def test_over_many_short_phases_weights_are_kept():
    """A batch of 4 in each of 100 phases: what one phase cannot give is not lost.

    The shares of the first corpus are 1/4 to 3/4, of 4 places each: 200 in all. The variance of
    being rounded is at most 1/4, so that five standard deviations over 100 phases are 25.
    """
    schedule = MixtureSchedule([50, 50], [[1, 3], [3, 1]], [0, 100], interpolate=True)
    assert len(schedule.phases) == 101
    counts = []
    for seed in range(8):
        order = PositionSampler(100, 4, mixture=schedule, seed=seed).order
        counts.append(order.counts(400)[0])
    assert max(abs(count - 200) for count in counts) < 25
    assert abs(np.mean(counts) - 200) < 9


def test_weights_go_from_one_step_to_the_next():
    steps = [0, 4, 1004]
    schedule = MixtureSchedule([9, 9], [[1, 0], [1, 1], [0, 1]], steps, interpolate=True)
    assert [schedule.weights_at(n) for n in range(5)] == [
        [1, 0],
        [0.875, 0.125],
        [0.75, 0.25],
        [0.625, 0.375],
        [0.5, 0.5],
    ]
    # A hundred changes over a thousand batches: what holds is that of the last one before.
    for n in (4, 13, 14, 504, 1003, 1004, 9999):
        far = min((n - 4) // 10 / 100, 1)
        assert schedule.weights_at(n) == pytest.approx([0.5 - far / 2, 0.5 + far / 2], abs=1e-6)
    assert schedule.weights_at(9999) == [0, 1]


def test_phases_hold_until_the_next():
    schedule = MixtureSchedule([40, 40], [[3, 1], [0, 1]], [0, 10])
    sampler = PositionSampler(80, 8, mixture=schedule)
    counts = [Counter(sample >= 40 for sample in sampler.batch(n)) for n in range(20)]
    assert all(count == {False: 6, True: 2} for count in counts[:10])
    assert all(count == {True: 8} for count in counts[10:])


def test_ranks_take_slices_of_one_batch_and_a_batch_far_ahead_is_looked_up():
    schedule = MixtureSchedule(SIZES, [[1, 1, 1], [5, 1, 1]], [0, 50], interpolate=True)
    whole = a_sampler(schedule)
    ranks = [a_sampler(schedule, batch_size=4, num_replicas=2, rank=rank) for rank in range(2)]
    for n in (0, 9, 49, 50, 51, 10**9):
        both = [sample for rank in ranks for sample in rank.batch(n)]
        assert whole.batch(n) == [sample for sample in both if sample >= 0]
        assert a_sampler(schedule).batch(n) == whole.batch(n)
        assert sum(whole.order.counts(whole.before(n))) == whole.before(n)
    assert ranks[1].stream() == whole.stream()


def test_resumes_at_any_batch():
    schedule = MixtureSchedule(SIZES, [[1, 1, 1], [5, 1, 1]], [0, 50], interpolate=True)
    for position in (0, 7, 12, 13, 49, 51, 200):
        sampler = a_sampler(schedule, position=lambda position=position: position)
        whole = a_sampler(schedule)
        assert [*sampler] == [whole.batch(n) for n in range(position, position + len(whole))]


def test_the_stream_of_a_seed_never_changes():
    """A checkpoint of an older version goes on with the batches that it would have seen."""
    schedule = MixtureSchedule([5, 3], [[1, 1], [3, 1]], [0, 2])
    sampler = PositionSampler(8, 4, mixture=schedule, seed=5)
    batches = [sampler.batch(n) for n in range(5)]
    assert batches[:2] == [[5, 1, 7, 4], [6, 3, 6, 2]]
    assert batches[2:] == [[5, 0, 3, 1], [7, 2, 0, 4], [6, 2, 4, 0]]


def test_the_plain_form_says_all():
    one = MixtureSchedule([5, 3], [[1, 1], [3, 1]], [0, 2])
    assert one.plain() == {
        "sizes": [5, 3],
        "phases": [[0, PARTS // 2, PARTS // 2], [2, PARTS * 3 // 4, PARTS // 4]],
    }


@pytest.mark.parametrize(
    ("weights", "steps", "message"),
    [
        ([[1, 1]], [0, 5], r"steps=\[0, 5\]\): must be as many as there are weights, 1"),
        ([], [], r"steps=\[\]\): must be as many"),
        ([[1, 1]], [5], r"steps=\[5\]\): must begin at 0 and rise"),
        ([[1, 1]] * 3, [0, 5, 5], r"must begin at 0 and rise"),
        ([[1, 1]] * 2, [0, 2.5], r"steps\[1\]=2\.5\): must be a whole number"),
        ([[1, 1, 1]], [0], r"weights=\[1, 1, 1\]\): must be as many as there are corpora, 2"),
        ([[1, -1]], [0], r"weights=-1\): must be a finite number from 0 on"),
        ([[1, float("nan")]], [0], r"weights=nan\): must be a finite number from 0 on"),
        ([[0, 0]], [0], r"weights=\[0, 0\]\): must not all be 0"),
        ([[1, 1e-9]], [0], r"weights=1e-09\): is less than one of 1048576 samples\. Raise it"),
    ],
)
def test_refuses(weights, steps, message):
    with pytest.raises(ValueError, match=f"MixtureSchedule.*{message}"):
        MixtureSchedule([9, 9], weights, steps)


def test_refuses_other_samples_and_an_order_that_is_not_shuffled():
    schedule = MixtureSchedule([9, 9], [[1, 1]], [0])
    with pytest.raises(ValueError, match=r"must be all samples of the mixture's corpora, 18"):
        PositionSampler(17, 2, mixture=schedule)
    with pytest.raises(ValueError, match="a mixture must be shuffled"):
        PositionSampler(18, 2, mixture=schedule, shuffle=False)
    with pytest.raises(ValueError, match="sizes"):
        MixtureSchedule([9, 0], [[1, 1]], [0])
