"""Ranks, positions and resuming of batches of one length."""

from collections import Counter
from itertools import islice

import pytest
from torch.utils.data import DataLoader

from lightning_align.data.bucket_sampler import BucketSampler
from lightning_align.data.sampler import PositionSampler, padding
from lightning_align.data.skipped import SkippedBatches

SIZES, LENGTHS = [37, 20, 9], [8, 16, 64]


def a_sampler(batch_size=2, **options):
    return BucketSampler(SIZES, LENGTHS, batch_size, **{"seed": 3, **options})


def length_of(piece):
    return LENGTHS[sum(piece >= first for first in (37, 57))]


@pytest.mark.parametrize("options", [{}, {"odds": "grow_p2", "cycles": 2}, {"odds": [1, 3, 2]}])
def test_over_two_ranks_a_pass_has_each_piece_once_and_both_have_one_length(options):
    whole = a_sampler(**options)
    ranks = [a_sampler(1, num_replicas=2, rank=rank, **options) for rank in range(2)]
    assert len({len(each) for each in (whole, *ranks)}) == 1
    seen: Counter[int] = Counter()
    for n in range(2 * len(whole)):
        parts = [rank.batch(n) for rank in ranks]
        real = [piece for part in parts for piece in part if piece >= 0]
        assert real == whole.batch(n)
        assert whole.before(n) == sum(seen.values())
        named = [piece if piece >= 0 else padding(piece) for part in parts for piece in part]
        assert {length_of(piece) for piece in named} == {whole.buckets.length(n)}
        assert len(real) * whole.buckets.length(n) <= 128
        seen.update(real)
        if (n + 1) % len(whole) == 0:
            assert seen == Counter(dict.fromkeys(range(66), (n + 1) // len(whole)))


def test_all_batches_but_the_last_of_a_bucket_have_the_same_tokens():
    sampler = a_sampler()
    tokens = [len(sampler.batch(n)) * sampler.buckets.length(n) for n in range(len(sampler))]
    assert sum(count < 128 for count in tokens) <= 3
    assert sum(tokens) == 37 * 8 + 20 * 16 + 9 * 64


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_goes_on_at_any_batch(num_workers):
    class Rows:
        def __len__(self):
            return 66

        def __getitem__(self, indices):
            return indices

    whole = a_sampler()
    for start in (7,) if num_workers else (0, 1, len(whole), 3 * len(whole) - 1):
        sampler = a_sampler(position=lambda start=start: start)
        assert isinstance(sampler, PositionSampler)
        options = {"multiprocessing_context": "fork"} if num_workers else {}
        loader = DataLoader(
            Rows(), sampler=sampler, batch_size=None, num_workers=num_workers, **options
        )
        assert [*islice(loader, 5)] == [whole.batch(n) for n in range(start, start + 5)]


def test_skipped_batches_are_passed_over():
    sampler = a_sampler(skipped=lambda: SkippedBatches([(2, 4)]))
    assert [*islice(sampler, 4)] == [sampler.batch(n) for n in (0, 1, 4, 5)]


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"odds": "grow_p2"}, {"cycles": 2}, {"batch_size": 3}]
)
def test_its_stream_says_what_decides_its_batches(other):
    assert a_sampler(**other).stream() != a_sampler().stream()
    assert a_sampler(1, num_replicas=2).stream() == a_sampler().stream()


def test_refuses_sizes_of_other_buckets():
    with pytest.raises(ValueError, match=r"sizes=\[3\]\): must be as many as .*, 2"):
        BucketSampler([3], [8, 16], 1)
    with pytest.raises(ValueError, match=r"batch_size=0\): must be at least 1"):
        a_sampler(0)
