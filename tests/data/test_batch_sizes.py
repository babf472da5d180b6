"""Sizes of batches that change with time, by counting."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.batch_sizes import BatchSizes
from lightning_align.data.curriculum_sampler import CurriculumSampler
from lightning_align.data.mixture import Mixture
from lightning_align.data.pacing import CurriculumScheduler
from lightning_align.data.sampler import PositionSampler

GROWING = {
    "min_difficulty": 2,
    "max_difficulty": 16,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 20, "difficulty_step": 2},
}


@st.composite
def phases(draw):
    gaps = draw(st.lists(st.integers(1, 9), max_size=5))
    sizes = draw(st.lists(st.integers(1, 7), min_size=len(gaps) + 1, max_size=len(gaps) + 1))
    return [(sum(gaps[:i]), size) for i, size in enumerate(sizes)]


@given(phases())
def test_what_comes_before_a_batch_is_the_sum_of_those_before(pairs):
    sizes = BatchSizes(pairs)
    before = 0
    for n in range(60):
        expected = next(size for first, size in reversed(pairs) if first <= n)
        assert (sizes.size(n), sizes.before(n)) == (expected, before)
        assert sizes.batches_for(before) == n
        assert sizes.batches_for(before + 1) == n + 1
        before += expected
    assert (sizes.last, sizes.greatest) == (pairs[-1][1], max(size for _, size in pairs))


def test_a_batch_has_the_size_of_the_step_that_it_is_counted_from_one():
    sizes, scheduler = BatchSizes.scheduled(GROWING), CurriculumScheduler(GROWING)
    assert [sizes.size(n) for n in range(40)] == [
        scheduler.get_difficulty(n + 1) for n in range(40)
    ]


@pytest.mark.parametrize(("first", "num_replicas"), [(90, 1), (1, 1), (90, 3)])
def test_in_tokens_a_batch_has_the_size_of_as_many_as_come_before_it(first, num_replicas):
    """By playing the run; where the schedule is fast a batch goes over several changes."""
    schedule = {"difficulty": [1, 2, 3, 9], "max_tokens": [first, 2 * first + 99, 1000]}
    config = {**GROWING, "max_difficulty": 9, "schedule_type": "fixed_discrete"}
    scheduler = CurriculumScheduler({**config, "schedule_config": schedule})
    sizes = BatchSizes.scheduled(scheduler, tokens_per_sample=10, num_replicas=num_replicas)
    tokens = 0
    for n in range(150):
        assert sizes.size(n) == scheduler.get_difficulty(tokens), n
        tokens += 10 * num_replicas * sizes.size(n)
    assert sizes.size(150) == 9


def test_at_constant_tokens_shorter_samples_are_more():
    lengths = {**GROWING, "min_difficulty": 8, "max_difficulty": 64}
    lengths["schedule_config"] = {"total_curriculum_step": 20, "difficulty_step": 8}
    sizes, scheduler = BatchSizes.at_constant_tokens(lengths, 256), CurriculumScheduler(lengths)
    for n in range(30):
        assert sizes.size(n) == 256 // scheduler.get_difficulty(n + 1)
    assert (sizes.size(0), sizes.last) == (32, 4)


def ranks(num_samples, sizes, world, **options):
    kept = BatchSizes([(n, size // world) for n, size in sizes.phases])
    return [
        PositionSampler(
            num_samples, kept.last, batch_sizes=kept, num_replicas=world, rank=rank, **options
        )
        for rank in range(world)
    ]


@settings(deadline=None, max_examples=30)
@given(phases(), st.integers(1, 90), st.integers(0, 99), st.sampled_from([1, 2]), st.booleans())
def test_every_pass_has_each_sample_once_over_1_and_2_ranks(pairs, num_samples, seed, world, mix):
    """Batches are cut from one stream; on two ranks at the same global batch they are the same."""
    sizes = BatchSizes([(n, 2 * size) for n, size in pairs])
    mixture = Mixture([num_samples, 3], [num_samples, 3]) if mix else None
    total = num_samples + 3 * mix
    (whole,) = ranks(total, sizes, 1, seed=seed, mixture=mixture)
    parts = ranks(total, sizes, world, seed=seed, mixture=mixture)
    stream = []
    for n in range(60):
        batch = [index for part in parts for index in part.batch(n)]
        assert batch == whole.batch(n)
        assert {len(part.batch(n)) for part in parts} == {sizes.size(n) // world}
        assert len(stream) == whole.before(n)
        stream += batch
    for first in range(0, len(stream) - total, total):
        assert sorted(stream[first : first + total]) == [*range(total)]
    assert len(parts[0]) == len(whole)
    assert whole.before(len(whole) - 1) < total <= whole.before(len(whole))
    assert [part.stream() for part in parts] == [whole.stream()] * world


@pytest.mark.parametrize("position", [0, 3, 9, 10, 19, 57, 10**9])
def test_resumes_at_any_batch_without_replay(position):
    sizes = BatchSizes.scheduled(GROWING)
    sampler = PositionSampler(101, 16, seed=1, batch_sizes=sizes, position=lambda: position)
    tail = [*sampler]
    assert tail == [sampler.batch(n) for n in range(position, position + len(sampler))]
    if position < 100:
        fresh = PositionSampler(101, 16, seed=1, batch_sizes=sizes)
        stream = [index for n in range(position + 1) for index in fresh.batch(n)]
        assert stream[-sizes.size(position) :] == tail[0]


def test_under_a_curriculum_levels_begin_where_their_batch_does():
    sizes = BatchSizes.scheduled(GROWING)
    pace = {**GROWING, "min_difficulty": 20, "max_difficulty": 100}
    pace["schedule_config"] = {"total_curriculum_step": 30, "difficulty_step": 10}
    difficulties = [1 + sample % 100 for sample in range(500)]
    sampler = CurriculumSampler(difficulties, pace, 16, batch_sizes=sizes)
    scheduler = CurriculumScheduler(pace)
    for n in range(40):
        batch, allowed = sampler.batch(n), scheduler.get_difficulty(n + 1)
        assert len(batch) == sizes.size(n)
        assert max(difficulties[sample] for sample in batch) <= allowed
        assert sampler.num_eligible(n) == 5 * allowed
    first = sampler.before(29)
    assert first == sizes.before(29)
    stream = [sample for n in range(29, 200) for sample in sampler.batch(n)]
    assert sorted(stream[:500]) == [*range(500)]


def test_a_stream_says_its_sizes():
    sizes = BatchSizes([(0, 2), (5, 4)])
    stream = PositionSampler(9, 4, batch_sizes=sizes, num_replicas=2).stream()
    assert stream["batch_sizes"] == [[0, 4], [5, 8]]
    assert stream["global_batch_size"] == 8


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], r"phases=\[\]\): the first must be at batch 0"),
        ([(1, 2)], r"the first must be at batch 0"),
        ([(0, 2), (0, 3)], r"each must begin at a later batch"),
        ([(0, 0)], r"size=0\): must be at least 1"),
        ([(0, 2.0)], r"size=2\.0\): must be a whole number"),
    ],
)
def test_refuses_phases(phases, message):
    with pytest.raises(ValueError, match=message):
        BatchSizes(phases)


def test_refuses():
    with pytest.raises(ValueError, match=r"batch_size=8\): must be the last of the sizes .*, 4\."):
        PositionSampler(9, 8, batch_sizes=BatchSizes([(0, 2), (5, 4)]))
    tokens = {"total_curriculum_tokens": 100, "difficulty_step": 1}
    with pytest.raises(ValueError, match="must be told how many a sample has"):
        BatchSizes.scheduled({**GROWING, "schedule_config": tokens})
    with pytest.raises(ValueError, match="must follow from its number"):
        BatchSizes.at_constant_tokens({**GROWING, "schedule_config": tokens}, 64)
    with pytest.raises(ValueError, match=r"tokens=15\): must be at least the greatest length, 16"):
        BatchSizes.at_constant_tokens(GROWING, 15)
    discrete = {"difficulty": [1.5, 16], "max_step": [3]}
    config = {**GROWING, "schedule_type": "fixed_discrete", "schedule_config": discrete}
    with pytest.raises(ValueError, match=r"scheduler=1\.5\): gives a number of samples"):
        BatchSizes.scheduled(config)
