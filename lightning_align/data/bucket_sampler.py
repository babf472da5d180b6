"""The sampler of dataset decomposition: a ``PositionSampler`` whose batches are of one length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_least
from lightning_align.data.buckets import WHERE, BucketBatches
from lightning_align.data.sampler import PositionSampler, padding, rank_share
from lightning_align.data.skipped import SkippedBatches


@declared
class BucketSampler(PositionSampler):
    """Yields this rank's pieces of batches that come from one bucket each.

    All batches have the same number of tokens, but for the last one of a bucket in a pass, which
    may be smaller and is split over the ranks as evenly as it goes.

    Args:
        sizes: Pieces of each bucket; the samples are numbered bucket after bucket.
        lengths: Predictions of a piece of each bucket, the shortest first.
        batch_size: Pieces of the longest bucket per batch and rank; of others there are more.
        seed: Seed of every order.
        odds: See ``BucketBatches``.
        cycles: See ``BucketBatches``.
        num_replicas: Number of ranks that share a batch.
        rank: This process, counted from 0.
        position: Called once when an iteration starts; returns how many batches come before its
            first, those that are skipped not counted.
        skipped: Called with ``position``; returns the batches to pass over, by their numbers.

    Attributes:
        buckets: Which pieces are in which batch.

    Raises:
        ValueError: If a count is below 1, or odds or cycles are out of their ranges.

    Example:
        >>> sampler = BucketSampler([4, 2], [8, 16], batch_size=1)
        >>> [len(sampler.batch(n)) for n in range(len(sampler))]
        [2, 1, 2, 1]
    """

    def __init__(
        self,
        sizes: Sequence[int],
        lengths: Sequence[int],
        batch_size: int,
        seed: int = 0,
        *,
        odds: Sequence[float] | str | None = None,
        cycles: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
        position: Callable[[], int] | None = None,
        skipped: Callable[[], SkippedBatches] = SkippedBatches,
    ) -> None:
        check_least(WHERE, 1, batch_size=batch_size, num_replicas=num_replicas)
        if not len(sizes) or len(sizes) != len(lengths):
            rule = f"must be as many as there are lengths, {len(lengths)}"
            raise argument_error(WHERE, "sizes", list(sizes), rule)
        tokens = batch_size * num_replicas * int(lengths[-1])
        self.buckets = BucketBatches(sizes, lengths, tokens, seed, odds=odds, cycles=cycles)
        self._plan = {
            "odds": odds if odds is None or isinstance(odds, str) else list(odds),
            "cycles": cycles,
        }
        super().__init__(
            int(sum(sizes)),
            batch_size,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
            position=position,
            skipped=skipped,
        )

    @override
    def __len__(self) -> int:
        return len(self.buckets)

    @override
    def before(self, n: int) -> int:
        return self.buckets.before(n)

    @override
    def batch(self, n: int) -> list[int]:
        pieces = self.buckets.batch(n)
        first, last = rank_share(len(pieces), self.num_replicas, self.rank)
        return pieces[first:last] or [padding(pieces[0])]

    @override
    def stream(self) -> dict[str, Any]:
        lengths, sizes = self.buckets.lengths.tolist(), self.buckets.sizes.tolist()
        return {**super().stream(), "lengths": lengths, "pieces": sizes, **self._plan}
