"""The sampler that makes batch n a pure function of (seed, n).

PyTorch's samplers hand out a random order once per epoch and forget where they were, so a run that
is killed in mid-epoch can neither continue nor say what it has seen. Here the order of pass k over
the data is drawn from (seed, k) alone, and batch n of a run is looked up, not replayed: whoever
knows the position of a run knows every batch to come.

It is a ``DistributedSampler`` whose items are lists of indices, used with ``DataLoader(dataset,
sampler=..., batch_size=None)``. Under several processes Lightning replaces any other sampler, and
duplicates data or crashes with a custom ``batch_sampler``; this one it leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Protocol, cast

from torch.utils.data.distributed import DistributedSampler

from lightning_align._errors import argument_error, check_least
from lightning_align.data.mixture import Mixture
from lightning_align.data.order import Order, Sequential, mixed, shuffled
from lightning_align.data.skipped import SkippedBatches

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset


class BatchDataset(Protocol):
    """A dataset that is indexed with the sampler's *lists* of indices and returns batches."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, indices: Sequence[int], /) -> dict[str, Tensor]:
        """The batch of the samples ``indices``; a negative one is ``padding``."""
        ...


def padding(index: int) -> int:
    """The index that means "sample ``index``, with nothing to learn from"; its own inverse."""
    return -(index + 1)


class PositionSampler(DistributedSampler[list[int]]):
    """Yields this rank's batches of a stream that any position can be looked up in.

    Pass k visits every sample exactly once, in its own order. The last batch of a pass may be
    smaller and is split over the ranks as evenly as it goes. A rank that would get nothing gets one
    *padding* index, ``-(i + 1)``: it must take part in the collective operations of the step, with
    nothing to learn from.

    Args:
        num_samples: Number of samples in the dataset.
        batch_size: Samples per batch and rank.
        seed: Seed of every order.
        shuffle: Draw an order per pass; otherwise samples come in their own order.
        num_replicas: Number of ranks that share a batch.
        rank: This process, counted from 0.
        position: Called once when an iteration starts; returns how many batches come before its
            first, those that are skipped not counted. By default ``ExactResume`` knows it, and
            without that each epoch is one pass.
        mixture: Corpora of unequal weight that the samples belong to; None takes every sample once
            per pass.
        skipped: Called with ``position``; returns the batches to pass over, by their numbers.

    Attributes:
        order: The stream of samples that batches are cut from; another one may be put in its place.
        start: Number of the first batch of the latest iteration; None before the first.
        follow: What ``ExactResume`` puts in the place of both functions: returns the number of the
            first batch, and the batches to pass over from there on.

    Raises:
        ValueError: If a count is below 1, ``rank`` is outside ``[0, num_replicas)``, or a mixture
            is not of these samples or not shuffled.

    Example:
        >>> sampler = PositionSampler(5, 2, shuffle=False, position=lambda: 1)
        >>> list(sampler)
        [[2, 3], [4], [0, 1]]
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        position: Callable[[], int] | None = None,
        mixture: Mixture | None = None,
        skipped: Callable[[], SkippedBatches] = SkippedBatches,
    ) -> None:
        sizes = {"num_samples": num_samples, "batch_size": batch_size, "num_replicas": num_replicas}
        check_least("PositionSampler", 1, **sizes)
        if not 0 <= rank < num_replicas:
            rule = f"must be in [0, {num_replicas})"
            raise argument_error("PositionSampler", "rank", rank, rule)
        self.order: Order = shuffled(num_samples, seed) if shuffle else Sequential(num_samples)
        if mixture is not None:
            if sum(mixture.sizes) != num_samples:
                rule = f"must be all samples of the mixture's corpora, {sum(mixture.sizes)}"
                raise argument_error("PositionSampler", "num_samples", num_samples, rule)
            if not shuffle:
                rule = "a mixture must be shuffled: its corpora would come one after the other"
                raise argument_error("PositionSampler", "shuffle", shuffle, rule)
            self.order = mixed(mixture, seed)
        # The parent only ever asks a dataset for its length.
        dataset = cast("Dataset[list[int]]", range(num_samples))
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.batch_size = batch_size
        self.position = position
        self.skipped = skipped
        self.follow: Callable[[], tuple[int, SkippedBatches]] = self._place
        self.start: int | None = None

    def __len__(self) -> int:
        """Batches per pass, the same on every rank."""
        return -(-len(self._samples) // (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        """One window of ``len(self)`` batches that begins at the run's position."""
        # Not a generator: the position must be read now, not when the first batch is asked for.
        self.start, skipped = self.follow()
        return map(self.batch, islice(skipped.kept_from(self.start), len(self)))

    def _place(self) -> tuple[int, SkippedBatches]:
        skipped = self.skipped()
        kept = self.position() if self.position is not None else self.epoch * len(self)
        return skipped.position_of(kept), skipped

    def batch(self, n: int) -> list[int]:
        """This rank's indices of global batch ``n``, a pure function of the seed and ``n``."""
        pass_number, batch_number = divmod(n, len(self))
        global_size = self.batch_size * self.num_replicas
        begin = batch_number * global_size
        size = min(global_size, len(self._samples) - begin)
        begin += pass_number * len(self._samples)
        # The first `extra` ranks take one sample more, as numpy.array_split would have it.
        share, extra = divmod(size, self.num_replicas)
        first = begin + self.rank * share + min(self.rank, extra)
        last = first + share + (self.rank < extra)
        if first == last:
            return [padding(index) for index in self.order.indices(begin, begin + 1)]
        return self.order.indices(first, last)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the pass of a sampler that is told no position; else it does nothing.

        Lightning calls this before each epoch. If it changed the order of a run that has a
        position, a batch would depend on how the run was cut into epochs, and no longer on (seed,
        n) alone.
        """
        self.epoch = epoch

    @property
    def _samples(self) -> range:
        return cast("range", self.dataset)
