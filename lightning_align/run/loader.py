"""Any training loader made to follow the position of the run.

A loader is resumed exactly if it yields the batches that were not consumed yet, in the order of the
run that was killed, with the random draws that its dataset would have made. Nothing of that is in a
checkpoint for a plain DataLoader: its sampler draws the order of an epoch from torch's generator,
which every dropout mask has advanced. So

- before an epoch's iterators are made the generators are seeded from (seed, epoch), and before each
  batch is drawn from (seed, epoch, number of the batch): the order is a function of the epoch;
- a resumed epoch is begun anew, and the batches that were consumed are drawn and dropped. This
  costs loading them once. A loader with ``state_dict`` and ``load_state_dict`` is asked for its
  state instead, and nothing is dropped;
- batches that are passed over are drawn and dropped, too, into the next pass where this one has no
  more; a ``PositionSampler`` leaves them out by itself (passes.py, skipping.py).

This is also the one place where a batch may be cut: it is drawn whole, by workers that run ahead
and know no number, and everybody who counts, moves or learns from it comes behind.

The seeds are the same on every rank: samplers that shuffle by the global generator and then take
their rank's part rely on that.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader
from typing_extensions import Self, override

from lightning_align._compat.lightning_resume import (
    combined_length,
    combined_mode,
    shut_down_workers,
)
from lightning_align._errors import argument_error
from lightning_align.data.sampler import PositionSampler
from lightning_align.data.skipped import SkippedBatches
from lightning_align.data.streams import StreamBatches
from lightning_align.run.passes import EndedPasses, EpochStream
from lightning_align.run.position import Place
from lightning_align.run.rng import reseed
from lightning_align.seeds import derive_seed


class PositionedLoader(CombinedLoader):
    """What Lightning iterates over instead of the loaders themselves.

    Args:
        loaders: What ``train_dataloader`` returned.
        seed: Seed of the run; asked for whenever an epoch begins.
        place: Where the next batch is to come from; asked for whenever an epoch begins.
        consumed: How many batches of this epoch are part of the weights.
        position: How many batches of all epochs are.
        replica: Number of replicas that share a batch, and that of this rank.
        skipped: What of the stream is passed over; asked for whenever an iteration begins.
        ended: Passes over the data that have ended, where batches of them were passed over.
        cut: Given a batch and its number in the stream, returns the one that is trained.

    Attributes:
        started: Where the present iteration began, or None before the first.
        restart_at: Where the next iteration is to begin instead of at ``place()``.

    Raises:
        ValueError: If a ``PositionSampler`` is one of another number of replicas.
    """

    def __init__(
        self,
        loaders: Any,
        *,
        seed: Callable[[], int],
        place: Callable[[], Place],
        consumed: Callable[[], int],
        position: Callable[[], int],
        replica: tuple[int, int],
        skipped: Callable[[], SkippedBatches] = SkippedBatches,
        ended: EndedPasses | None = None,
        cut: Callable[[Any, int], Any] | None = None,
    ) -> None:
        mode: Any = "max_size_cycle"  # Lightning's default
        if isinstance(loaders, CombinedLoader):
            loaders, mode = loaders.iterables, combined_mode(loaders)
        super().__init__(loaders, mode)
        self.started: Place | None = None
        self.restart_at: Place | None = None
        self._seed, self._place, self._consumed = seed, place, consumed
        self._position, self._skipped = position, skipped
        self._ended = EndedPasses() if ended is None else ended
        self._cut = cut
        for sampler in (sampler for loader in self.flattened for sampler in _samplers(loader)):
            _check_replica(sampler, replica)
        self._stream = EpochStream(0, 0, None, SkippedBatches(), self._ended)  # of this epoch
        self._drawn = 0  # batches of this epoch that were drawn, dropped ones not counted
        self._taken = Place(0, 0)  # the pass, and how many batches the loaders have given of it
        self._begun = Place(0, 0)  # the same when this iteration of them began
        self._next = 0  # number in the stream of the batch that they give next
        self._drawn_ahead = False  # Lightning does so to notice the end of data without a length
        self._states: dict[int, list[dict[str, Any]]] = {}  # batches drawn -> states of the loaders
        self._own_seeds: dict[int, int] = {}  # id of a generator -> the seed that its owner chose

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self._seed()

    @override
    def __iter__(self) -> Self:
        self.started, self.restart_at = self.restart_at or self._place(), None
        epoch, consumed = self.started
        self._ended.forget_behind(epoch)
        length, trained = combined_length(self), self._position() - consumed
        self._stream = EpochStream(epoch, trained, length, self._skipped(), self._ended)
        self._states, self._drawn_ahead = {}, length is None
        self._drawn = consumed
        place, number = self._stream.behind(consumed)
        if self._pass_over_themselves or (self._are_stateful and consumed > 0):
            self._begin(place, number)
            return self
        self._begin(Place(place.epoch, 0), number - place.batch)
        try:
            while self._taken.batch < place.batch:
                self._take()
        except StopIteration:
            where = f"batch {consumed} of epoch {epoch}"
            rule = f"the training loader ends after {self._taken.batch} batches"
            way_out = "Resume with the data and the batch size that the checkpoint was written with"
            raise argument_error("ExactResume", "ckpt_path", where, rule, way_out) from None
        return self

    @override
    def __next__(self) -> Any:
        if self._drawn_ahead and self._are_stateful:
            before = {number: s for number, s in self._states.items() if number == self._drawn - 1}
            self._states = {**before, self._drawn: copy.deepcopy(super()._state_dicts())}
        number = self._stream.number(self._drawn)
        batch, *place = self._draw()
        self._drawn += 1
        return (batch if self._cut is None else self._cut(batch, number)), *place

    def _draw(self) -> Any:
        """The epoch's next batch; what is to be passed over before it is drawn and dropped."""
        if self._pass_over_themselves:
            self._reseed(*self._stream.place(self._drawn))
            return super().__next__()
        while True:
            place = self._stream.place(self._drawn)
            if place.epoch != self._taken.epoch:
                self._use_up_state()
                self._begin(Place(place.epoch, 0), self._stream.number(self._drawn) - place.batch)
            try:
                while self._taken.batch < place.batch:
                    self._take()
                return self._take()
            except StopIteration:
                empty = self._taken.batch == 0
                if not self._stream.skipped or empty:
                    raise
                if not self._stream.end_pass(self._next, self._drawn):
                    raise

    def _take(self) -> Any:
        """The next batch that the loaders give."""
        self._reseed(*self._taken)
        batch = super().__next__()
        self._taken = Place(self._taken.epoch, self._taken.batch + 1)
        self._next += 1
        return batch

    def _use_up_state(self) -> None:
        """A loader may take up the state that it was given only where it is asked for a batch."""
        if self._are_stateful and self._taken == self._begun:
            with suppress(StopIteration):
                self._take()

    def _begin(self, place: Place, number: int) -> None:
        """Begin an iteration of the loaders at a place, whose batch has that number."""
        self._taken, self._begun, self._next = place, place, number
        for loader in self.flattened:
            self._begin_pass(loader, first=self._iterator is None)
        self._reseed(place.epoch)
        super().__iter__()

    def _reseed(self, epoch: int, batch: int = 0) -> None:
        reseed(self._seed(), batch, 0, f"data of epoch {epoch}")

    def _begin_pass(self, loader: Any, *, first: bool) -> None:
        """Let nothing of earlier passes decide what this one yields."""
        epoch, taken = self._taken
        restored = is_stateful(loader) and taken > 0
        for part in _parts(loader):
            # Lightning tells the epoch only after the workers have drawn the first batches.
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator) and not restored:
                own = self._own_seeds.setdefault(id(generator), generator.initial_seed())
                generator.manual_seed(derive_seed(own, self._seed(), 0, f"epoch {epoch}"))
        if isinstance(batches := getattr(loader, "dataset", None), StreamBatches):
            batches.start = self._next - taken
        for sampler in _samplers(loader):
            self._let_follow(sampler)
        persistent = isinstance(loader, DataLoader) and loader.persistent_workers
        if persistent and not first and not is_stateful(loader):
            # The draws of a worker that lives on depend on all the epochs before.
            shut_down_workers(loader)

    def _let_follow(self, sampler: PositionSampler) -> None:
        """Batch n of the run is batch n of the sampler, however often it is begun in an epoch."""
        assert self.started is not None
        consumed, own = self.started.batch, sampler.position
        position = own() if own is not None else self._position()
        first = position - consumed if position >= consumed else position
        ahead = first - self._stream.trained  # of the run's numbers, if the owner has others
        skipped = self._stream.skipped.shifted(ahead)
        if self._pass_over_themselves:
            sampler.follow = lambda: (ahead + self._stream.number(self._drawn), skipped)
        else:
            sampler.follow = lambda: (ahead + self._next, SkippedBatches())

    @property
    def _pass_over_themselves(self) -> bool:
        """Whether the loaders yield what is to be trained; else batches of all are dropped."""
        return all(
            isinstance(loader, DataLoader)
            and isinstance(loader.sampler, PositionSampler)
            and loader.batch_sampler is None
            for loader in self.flattened
        )

    @property
    def _are_stateful(self) -> bool:
        return all(map(is_stateful, self.flattened))

    @override
    def _state_dicts(self) -> list[dict[str, Any]]:
        """States of the loaders without a batch that was drawn but is not consumed yet."""
        if not self._are_stateful:
            return []
        consumed = self._consumed()
        return self._states[consumed] if consumed in self._states else super()._state_dicts()

    @override
    def _load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        if self._are_stateful:
            super()._load_state_dicts(states)


def is_stateful(loader: Any) -> bool:
    """Whether a loader can tell and restore where it stands."""
    return all(callable(getattr(loader, f"{verb}state_dict", None)) for verb in ("", "load_"))


def _parts(loader: Any) -> Iterator[Any]:
    """The loader and its samplers, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler, inner = (getattr(owner, "sampler", None) for owner in (loader, batch_sampler))
    parts = loader, sampler, batch_sampler, inner
    yield from {id(part): part for part in parts if part is not None}.values()


def _samplers(loader: Any, depth: int = 3) -> Iterator[PositionSampler]:
    """Samplers of ours in a loader, those in wrappers of them included."""
    for part in _parts(loader):
        yield from _unwrapped(part, 0 if part is loader else depth)


def _unwrapped(part: Any, depth: int) -> Iterator[PositionSampler]:
    if isinstance(part, PositionSampler):
        yield part
    elif depth:
        for inner in getattr(part, "__dict__", {}).values():
            yield from _unwrapped(inner, depth - 1)


def _check_replica(sampler: PositionSampler, replica: tuple[int, int]) -> None:
    own, (size, rank) = (sampler.num_replicas, sampler.rank), replica
    if own == replica:
        return
    rule = f"this is number {rank} of the {size} rank(s) that share a batch, and others would train"
    rule += " on the same samples"
    way_out = f"Give it num_replicas={size}, rank={rank}: see trainer.distributed_sampler_kwargs"
    raise argument_error("PositionSampler", "num_replicas, rank", own, rule, way_out)
