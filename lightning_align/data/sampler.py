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

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch.utils.data.distributed import DistributedSampler

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_least
from lightning_align.data.batch_sizes import BatchSizes
from lightning_align.data.mixture import Mixture
from lightning_align.data.mixture_schedule import MixtureSchedule
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


def rank_share(size: int, num_replicas: int, rank: int) -> tuple[int, int]:
    """What a rank has of a global batch of ``size`` samples: from which to which, exclusive."""
    # The first `extra` ranks take one sample more, as numpy.array_split would have it.
    share, extra = divmod(size, num_replicas)
    first = rank * share + min(rank, extra)
    return first, first + share + (rank < extra)


@declared
class PositionSampler(DistributedSampler[list[int]]):
    """Yields this rank's batches of a stream that any position can be looked up in.

    Pass k visits every sample exactly once, in its own order. The last batch of a pass may be
    smaller and is split over the ranks as evenly as it goes. A rank that would get nothing gets one
    *padding* index, ``-(i + 1)``: it must take part in the collective operations of the step, with
    nothing to learn from. With ``batch_sizes`` every batch is full instead, and one that reaches
    over the end of a pass is filled from the next.

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
        mixture: Corpora of unequal weight that the samples belong to, whose weights may change with
            time; None takes every sample once per pass.
        skipped: Called with ``position``; returns the batches to pass over, by their numbers.
        batch_sizes: Samples per batch and rank where they change with time; the last of them is
            ``batch_size``.

    Attributes:
        order: The stream of samples that batches are cut from; another one may be put in its place.
        start: Number of the first batch of the latest iteration; None before the first.
        follow: What ``ExactResume`` puts in the place of both functions: returns the number of the
            first batch, and the batches to pass over from there on.
        yielded: Batches that were yielded, those that are passed over not counted.

    Raises:
        ValueError: If a count is below 1, ``rank`` is outside ``[0, num_replicas)``, a mixture is
            not of these samples or not shuffled, or sizes of batches end at another one.

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
        mixture: Mixture | MixtureSchedule | None = None,
        skipped: Callable[[], SkippedBatches] = SkippedBatches,
        batch_sizes: BatchSizes | None = None,
    ) -> None:
        sizes = {"num_samples": num_samples, "batch_size": batch_size, "num_replicas": num_replicas}
        check_least("PositionSampler", 1, **sizes)
        if not 0 <= rank < num_replicas:
            rule = f"must be in [0, {num_replicas})"
            raise argument_error("PositionSampler", "rank", rank, rule)
        if batch_sizes is not None and batch_sizes.last != batch_size:
            rule = f"must be the last of the sizes that it grows through, {batch_sizes.last}"
            raise argument_error("PositionSampler", "batch_size", batch_size, rule)
        # The parent only ever asks a dataset for its length.
        dataset = cast("Dataset[list[int]]", range(num_samples))
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.batch_size = batch_size
        self.batch_sizes = batch_sizes
        self.position = position
        self.skipped = skipped
        self.follow: Callable[[], tuple[int, SkippedBatches]] = self._place
        self.start: int | None = None
        self.yielded = 0
        self._loaded: int | None = None
        self._left = 0  # batches of the window that is iterated over next
        self.mixture = mixture
        self.order: Order = shuffled(num_samples, seed) if shuffle else Sequential(num_samples)
        if mixture is not None:
            _check_mixture(mixture, num_samples, shuffle)
            if isinstance(mixture, MixtureSchedule):
                self.order = mixture.order(seed, self.before)
            else:
                self.order = mixed(mixture, seed)

    def __len__(self) -> int:
        """Batches of the first pass, the same on every rank."""
        if self.batch_sizes is not None:
            return self.batch_sizes.batches_for(-(-len(self._samples) // self.num_replicas))
        return -(-len(self._samples) // (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        """One window of ``len(self)`` batches that begins at the run's position."""
        # Not a generator: the position must be read now, not when the first batch is asked for.
        self._left = len(self)
        self.start, skipped = self.follow()
        self.yielded = skipped.kept_before(self.start)
        return map(self._yield, islice(skipped.kept_from(self.start), self._left))

    def _yield(self, n: int) -> list[int]:
        self.yielded += 1
        return self.batch(n)

    def _place(self) -> tuple[int, SkippedBatches]:
        skipped = self.skipped()
        loaded, self._loaded = self._loaded, None
        if self.position is not None:
            return skipped.position_of(self.position()), skipped
        if loaded is not None:
            self._left -= loaded % len(self)
        kept = self.epoch * len(self) if loaded is None else loaded
        return skipped.position_of(kept), skipped

    def state_dict(self) -> dict[str, Any]:
        """How many batches were yielded, and of which stream, as plain JSON.

        A loader with a state of its own asks for it, and drops no batches then.
        """
        return {"yielded": self.yielded, "stream": self.stream()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind what was yielded when the state was made, with what is left of that pass.

        Args:
            state: What ``state_dict`` returned, on any number of ranks of the same global batch.

        Raises:
            ValueError: If it belongs to another stream.
        """
        own = self.stream()
        for key, value in state["stream"].items():
            if own.get(key) != value:
                rule = f"the state belongs to another stream, whose {key} is {value!r}"
                where = type(self).__name__
                raise argument_error(where, key, own.get(key), rule, "Resume with the same")
        self.yielded = self._loaded = state["yielded"]

    def batch(self, n: int) -> list[int]:
        """This rank's indices of global batch ``n``, a pure function of the seed and ``n``."""
        begin = self.before(n)
        size = self.before(n + 1) - begin
        first, last = (begin + end for end in rank_share(size, self.num_replicas, self.rank))
        if first == last:
            return [padding(index) for index in self.order.indices(begin, begin + 1)]
        return self.order.indices(first, last)

    def before(self, n: int) -> int:
        """How many samples of the stream, over all ranks, come before global batch ``n``."""
        if self.batch_sizes is not None:
            return self.batch_sizes.before(n) * self.num_replicas
        pass_number, batch_number = divmod(n, len(self))
        global_size = self.batch_size * self.num_replicas
        return pass_number * len(self._samples) + batch_number * global_size

    def stream(self) -> dict[str, Any]:
        """What decides the batches beside the data, as plain JSON: with another, others come.

        It is the same on any number of ranks that share batches of the same size.
        """
        found: dict[str, Any] = {"seed": self.seed, "shuffle": self.shuffle}
        found["global_batch_size"] = self.batch_size * self.num_replicas
        if self.batch_sizes is not None:
            found["batch_sizes"] = self.batch_sizes.plain(self.num_replicas)
        if self.mixture is not None:
            found["mixture"] = self.mixture.plain()
        return found

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


def _check_mixture(mixture: Mixture | MixtureSchedule, num_samples: int, shuffle: bool) -> None:
    """Refuse a mixture that is not of these samples, or is not shuffled.

    Raises:
        ValueError: If it is one of these.
    """
    if sum(mixture.sizes) != num_samples:
        rule = f"must be all samples of the mixture's corpora, {sum(mixture.sizes)}"
        raise argument_error("PositionSampler", "num_samples", num_samples, rule)
    if not shuffle:
        rule = "a mixture must be shuffled: its corpora would come one after the other"
        raise argument_error("PositionSampler", "shuffle", shuffle, rule)
