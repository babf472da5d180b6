import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from lightning_align.data.sampler import PositionSampler, padding
from lightning_align.data.skipped import SkippedBatches

sizes = st.integers(1, 200)
batch_sizes = st.integers(1, 9)
worlds = st.integers(1, 5)
seeds = st.integers(0, 2**63 - 1)
positions = st.integers(0, 400)


def ranks(num_samples, batch_size, world, **options):
    return [
        PositionSampler(num_samples, batch_size, num_replicas=world, rank=rank, **options)
        for rank in range(world)
    ]


@settings(deadline=None)
@given(sizes, batch_sizes, worlds, seeds, st.booleans(), st.integers(0, 3))
def test_every_sample_exactly_once_per_pass(num_samples, batch_size, world, seed, shuffle, k):
    samplers = ranks(num_samples, batch_size, world, seed=seed, shuffle=shuffle)
    window = range(k * len(samplers[0]), (k + 1) * len(samplers[0]))
    seen = [i for n in window for sampler in samplers for i in sampler.batch(n) if i >= 0]
    assert sorted(seen) == list(range(num_samples))


@settings(deadline=None)
@given(sizes, batch_sizes, worlds, seeds, positions)
def test_ranks_partition_the_batch_of_one_process(num_samples, batch_size, world, seed, n):
    """4 samples on each of 2 ranks are the 8 of one: the stream doesn't depend on the split."""
    whole = PositionSampler(num_samples, batch_size * world, seed=seed).batch(n)
    parts = [sampler.batch(n) for sampler in ranks(num_samples, batch_size, world, seed=seed)]
    assert [i for part in parts for i in part if i >= 0] == whole
    real = [sum(i >= 0 for i in part) for part in parts]
    assert max(real) - min(real) <= 1
    for part, count in zip(parts, real, strict=True):
        assert part, "every rank takes part in every batch"
        assert count in (0, len(part)), "padding and samples are never mixed"
        assert all(padding(i) in whole for i in part if i < 0)


@settings(deadline=None)
@given(sizes, batch_sizes, worlds, seeds, st.lists(positions, min_size=1, max_size=8))
def test_a_batch_depends_on_seed_and_number_alone(num_samples, batch_size, world, seed, order):
    """Whatever was asked before, in whatever order, on a fresh or a used sampler: same answer."""
    rank = world - 1
    used = PositionSampler(num_samples, batch_size, seed=seed, num_replicas=world, rank=rank)
    for n in order:
        used.set_epoch(n)
        fresh = PositionSampler(num_samples, batch_size, seed=seed, num_replicas=world, rank=rank)
        assert used.batch(n) == fresh.batch(n)


@settings(deadline=None)
@given(sizes, batch_sizes, worlds, seeds, st.integers(0, 60))
def test_resume_is_the_tail_of_the_uninterrupted_stream(num_samples, batch_size, world, seed, p):
    def stream(start):
        """Windows one after the other, as a run of many epochs that began at `start` sees them."""
        position = start
        sampler = PositionSampler(
            num_samples, batch_size, seed=seed, num_replicas=world, position=lambda: position
        )
        while True:
            for batch in sampler:
                yield batch
                position += 1

    assert list(itertools.islice(stream(0), p, p + 20)) == list(itertools.islice(stream(p), 20))


@settings(deadline=None)
@given(sizes, batch_sizes, st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9))), seeds)
def test_what_is_skipped_is_passed_over_and_the_rest_is_the_stream(n, batch_size, pairs, seed):
    skipped = SkippedBatches((first, first + count) for first, count in pairs)
    sampler = PositionSampler(
        n, batch_size, seed=seed, position=lambda: trained, skipped=lambda: skipped
    )
    seen = []
    for trained in range(0, 4 * len(sampler), len(sampler)):
        seen += list(sampler)
        assert sampler.start == skipped.position_of(trained)
    kept = itertools.islice(skipped.kept_from(0), len(seen))
    assert seen == [sampler.batch(number) for number in kept]


def test_passes_differ_and_seeds_differ():
    one, two = PositionSampler(100, 100, seed=1), PositionSampler(100, 100, seed=2)
    assert len({tuple(batch) for batch in (one.batch(0), one.batch(1), two.batch(0))}) == 3


def test_the_stream_of_a_seed_never_changes():
    """A checkpoint of an older version goes on with the batches that it would have seen."""
    sampler = PositionSampler(7, 3, seed=5)
    assert [sampler.batch(n) for n in range(4)] == [[2, 3, 4], [1, 5, 6], [0], [6, 2, 0]]


def test_order_is_close_to_uniform():
    """Where sample 0 of 4 lands over 4000 seeds: 1000 each; five standard deviations are 137."""
    places = [PositionSampler(4, 4, seed=seed).batch(0).index(0) for seed in range(4000)]
    assert np.abs(np.bincount(places, minlength=4) - 1000).max() < 137


class Squares(Dataset):
    def __getitem__(self, indices):
        return [i * i for i in indices]

    def __len__(self):
        return 11


@pytest.mark.parametrize("num_workers", [0, 2])
def test_dataloader_yields_the_batches_in_order(num_workers):
    position = 0
    sampler = PositionSampler(11, 2, seed=3, position=lambda: position)
    loader = DataLoader(Squares(), sampler=sampler, batch_size=None, num_workers=num_workers)
    assert len(loader) == 6
    for position in (0, 4, 9):
        got = list(loader)
        assert got == [[i * i for i in sampler.batch(n)] for n in range(position, position + 6)]
        assert sampler.start == position


def test_position_is_read_when_iteration_starts():
    position = 2
    sampler = PositionSampler(10, 1, shuffle=False, position=lambda: position)
    iterator = iter(sampler)
    position = 7
    assert sampler.start == 2
    assert next(iterator) == [2]


@pytest.mark.slow
def test_a_hundred_million_samples():
    sampler = PositionSampler(10**8, 4, seed=1, num_replicas=2, rank=1)
    first, last = sampler.batch(0), sampler.batch(len(sampler) - 1)
    assert len({*first, *last}) == 8
    assert all(0 <= i < 10**8 for i in [*first, *last])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, r"PositionSampler\(num_samples=0\): must be at least 1"),
        ({"batch_size": 0}, r"PositionSampler\(batch_size=0\): must be at least 1"),
        ({"num_replicas": 0}, r"PositionSampler\(num_replicas=0\): must be at least 1"),
        ({"rank": 1}, r"PositionSampler\(rank=1\): must be in \[0, 1\)"),
        ({"rank": -1}, r"PositionSampler\(rank=-1\): must be in \[0, 1\)"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        PositionSampler(**{"num_samples": 3, "batch_size": 1, **options})


def test_without_a_position_an_epoch_is_one_pass_as_in_a_distributed_sampler() -> None:
    """A Trainer without ExactResume has nothing else to tell it."""
    sampler = PositionSampler(10, 4)
    passes = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        passes.append(list(sampler))
        assert sampler.start == 3 * epoch
        assert sorted(index for batch in passes[-1] for index in batch) == list(range(10))
    assert passes[0] != passes[1] != passes[2] != passes[0]
    followed = PositionSampler(10, 4, position=lambda: 3)
    followed.set_epoch(7)
    assert list(followed) == passes[1]


def test_behind_a_loaded_state_the_rest_of_its_pass_comes_and_then_whole_ones():
    def a_sampler():
        return PositionSampler(10, 2, seed=1)

    first = a_sampler()
    first.set_epoch(1)
    seen = list(itertools.islice(first, 3))
    state = json.loads(json.dumps(first.state_dict()))
    later = a_sampler()
    later.load_state_dict(state)
    later.set_epoch(1)
    assert [*seen, *later] == [first.batch(n) for n in range(5, 10)]
    later.set_epoch(2)
    assert list(later) == [first.batch(n) for n in range(10, 15)]
    # Where the run says where it is, a state says nothing.
    told = PositionSampler(10, 2, seed=1, position=lambda: 4)
    told.load_state_dict(state)
    assert list(told) == [first.batch(n) for n in range(4, 9)]
    with pytest.raises(ValueError, match=r"PositionSampler\(seed=2\): the state belongs"):
        PositionSampler(10, 2, seed=2).load_state_dict(state)
