"""Batches of growing size from a stream that has no indices.

An ``IterableDataset`` says itself what comes next: nobody can order its samples, and a sampler has
nothing to choose. How many of them make batch n is still a pure function of n. A worker of a
DataLoader knows n without being told: of W workers number w makes the batches w, w + W, ..., which
the loader takes from them in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import Parameter, signature
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, default_collate, get_worker_info
from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import argument_error

WHERE = "StreamBatches"


@declared
class StreamBatches(IterableDataset[Any]):
    """The samples of a stream in batches whose size is a function of their number.

    To be loaded with ``DataLoader(StreamBatches(...), batch_size=None)``. The last batch of an
    epoch may be smaller: nothing is left out. Its state, per worker, is that of the stream if it
    has one; else the samples that were given are drawn once more and dropped, which are the same if
    the stream does not shuffle.

    Args:
        stream: The samples, an ``IterableDataset`` as a rule.
        sizes: Number of samples (of this rank) in batch n, counted from 0 over all epochs.
        collate: Makes a batch of a list of samples; by default torch's ``default_collate``.

    Attributes:
        start: Number of the first batch of an epoch, which ``ExactResume`` sets.

    Raises:
        ValueError: If the stream cannot be iterated over, or has indices.

    Example:
        >>> batches = StreamBatches([1, 2, 3, 4, 5], sizes=lambda n: n + 1, collate=list)
        >>> list(batches)
        [[1], [2, 3], [4, 5]]
    """

    def __init__(
        self,
        stream: Iterable[Any],
        sizes: Callable[[int], int],
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        if not hasattr(stream, "__iter__"):
            rule = "must be a stream, which is iterated over"
            way_out = "A dataset with indices has a sampler: PositionSampler(..., batch_sizes=...)"
            raise argument_error(WHERE, "stream", type(stream).__name__, rule, way_out)
        self.stream, self.sizes, self.collate = stream, sizes, collate
        self.start = 0
        self._given = 0  # batches of this epoch, by this worker
        self._samples = 0  # in them
        self._left: tuple[int, int] | None = None  # the same, of an epoch that is gone on with

    @override
    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self._given, self._samples = self._left or (0, 0)
        samples = _drawn_from(iter(self.stream))
        if self._left is not None and not _has_state(self.stream):
            samples = islice(samples, self._samples, None)
        self._left = None
        while batch := list(islice(samples, self._size(self.start + first + step * self._given))):
            self._given, self._samples = self._given + 1, self._samples + len(batch)
            yield self.collate(batch)

    def state_dict(self) -> dict[str, Any]:
        """Where this worker stands in its epoch, and the state of the stream if it has one."""
        given, samples = self._left or (self._given, self._samples)
        state = {"start": self.start, "given": given, "samples": samples}
        if _has_state(self.stream):
            state["stream"] = self.stream.state_dict()  # type: ignore[attr-defined]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the batches of a state.

        Args:
            state: What ``state_dict`` returned, in the same worker of as many.
        """
        self.start, self._left = state["start"], (state["given"], state["samples"])
        if "stream" in state:
            self.stream.load_state_dict(state["stream"])  # type: ignore[attr-defined]

    def _size(self, n: int) -> int:
        size = self.sizes(n)
        if not isinstance(size, int) or size < 1:
            rule = f"must give a whole number from 1 on, and gave {size!r} for batch {n}"
            raise argument_error(WHERE, "sizes", self.sizes, rule)
        return size


def _drawn_from(iterator: Iterator[Any]) -> Iterator[Any]:
    """What is left of an iterator, which may be a stream that begins anew whenever it is asked."""
    end = object()
    return iter(lambda: next(iterator, end), end)


def _has_state(stream: Any) -> bool:
    """Whether a stream can tell and restore where it stands, without being told what was taken."""
    give = getattr(stream, "state_dict", None)
    if not callable(give) or not callable(getattr(stream, "load_state_dict", None)):
        return False
    needed = (each for each in signature(give).parameters.values() if each.default is each.empty)
    return all(each.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) for each in needed)
