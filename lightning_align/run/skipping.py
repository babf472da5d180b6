"""Batches that a run passes over, and the number of its present batch in the stream."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_align._compat.lightning_resume import restart_in_epoch, train_loaders
from lightning_align._compat.lightning_trainer import (
    current_hook,
    is_accumulating,
    restart_train_iteration,
)
from lightning_align._errors import argument_error
from lightning_align.data.skipped import SkippedBatches
from lightning_align.run.accumulation import replace_window
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.loader import PositionedLoader, is_stateful
from lightning_align.run.passes import EndedPasses
from lightning_align.run.position import Place, batches_consumed
from lightning_align.run.protocols import datamodule_skips

_HOOKS = ("on_train_start", "on_train_batch_end")


class Skipping:
    """What ExactResume knows of the batches that are passed over.

    A datamodule of ours has the ranges, which are a part of its position; of any other data they
    are here.

    Attributes:
        ended: Passes over data without a length that have ended.
    """

    def __init__(self) -> None:
        self.ended = EndedPasses()
        self._data: Any = None
        self._own = SkippedBatches()

    def follow(self, trainer: pl.Trainer) -> None:
        """Leave the ranges to the datamodule of a run, if it knows of any; a new run has none."""
        self._data = datamodule_skips(trainer)
        if batches_consumed(trainer) == 0:  # a resumed one loads its state later
            self._own = SkippedBatches()
            self.ended.load(())

    @property
    def by_datamodule(self) -> bool:
        """Whether the datamodule has the ranges, and passes over them itself."""
        return self._data is not None

    @property
    def ranges(self) -> SkippedBatches:
        """What of the stream is passed over."""
        return self._own if self._data is None else self._data.skipped

    @ranges.setter
    def ranges(self, ranges: SkippedBatches) -> None:
        if self._data is None:
            self._own = ranges
        else:
            self._data.skipped = ranges

    def state_dict(self) -> dict[str, Any]:
        """Plain data, none if nothing is passed over."""
        state = {"skipped": self._own.plain(), "ended": self.ended.plain()}
        return {name: value for name, value in state.items() if value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self._own = SkippedBatches(state_dict.get("skipped", ()))
        self.ended.load(state_dict.get("ended", ()))


def stream_position(trainer: pl.Trainer) -> int:
    """Number of the present training batch in the stream of the run, batches passed over included.

    Between two batches, also in ``on_train_batch_end``, it is that of the next one.

    Args:
        trainer: Who fits.
    """
    return skipped_batches(trainer).position_of(batches_consumed(trainer))


def skipped_batches(trainer: pl.Trainer) -> SkippedBatches:
    """What a run passes over."""
    skipping = _skipping(trainer)
    if skipping is None:
        skipping = Skipping()
        skipping.follow(trainer)
    return skipping.ranges


@contextmanager
def keep_skipping(trainer: pl.Trainer) -> Iterator[None]:
    """Let what is passed over outlast that a run goes back: it stays known what is left out."""
    skipping = _skipping(trainer)
    ranges = SkippedBatches() if skipping is None else skipping.ranges
    yield
    if skipping is not None:
        skipping.ranges = ranges


def skip_batches(
    trainer: pl.Trainer, ranges: SkippedBatches | Iterable[Iterable[int]]
) -> SkippedBatches:
    """Pass over more batches from the next one on, and begin the training loader anew.

    To be called on each rank with the same ranges, in ``on_train_start`` or ``on_train_batch_end``.
    What lies before the next batch is trained already, and left out. An epoch trains as many
    batches as before.

    Args:
        trainer: Who fits. It must have ``ExactResume``, which our modules bring themselves.
        ranges: Pairs (first, last) of numbers in the stream: batches first to last - 1.

    Returns:
        What of the ranges lies ahead.

    Raises:
        ValueError: If it is called elsewhere, without ``ExactResume``, or with ranges that are
            none.
    """
    if (hook := current_hook(trainer)) not in _HOOKS:
        rule = "the loader can be begun anew between two batches only"
        raise argument_error("skip_batches", "hook", hook, rule, f"Call it in {_HOOKS[1]}")
    if ahead := add_skipped(trainer, ranges):
        _begin_anew(trainer, in_epoch=hook == _HOOKS[1])
    return ahead


def add_skipped(
    trainer: pl.Trainer, ranges: SkippedBatches | Iterable[Iterable[int]]
) -> SkippedBatches:
    """``skip_batches`` for whoever begins the training loader anew by himself.

    Raises:
        ValueError: If the run has no ``ExactResume`` or gets new loaders, or the ranges are none.
    """
    skipping = _skipping(trainer)
    if skipping is None:
        rule = "without ExactResume no loader follows the position"
        names = [type(callback).__name__ for callback in callbacks_of(trainer)]
        raise argument_error("skip_batches", "callbacks", names, rule, "Add ExactResume()")
    every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    if every and not skipping.by_datamodule:
        rule = "where batches are left out, a loader goes on into its next pass, and there may be"
        rule += " another loader for that"
        argument = "reload_dataloaders_every_n_epochs"
        raise argument_error("skip_batches", argument, every, rule, "Leave it out")
    ahead = SkippedBatches.of(ranges).behind(stream_position(trainer))
    skipping.ranges = skipping.ranges | ahead
    return ahead


def _begin_anew(trainer: pl.Trainer, *, in_epoch: bool) -> None:
    """Begin the iteration of the training loader once more, where it stands."""
    loaders, batches = train_loaders(trainer), trainer.fit_loop.epoch_loop.batch_progress
    assert isinstance(loaders, PositionedLoader)
    assert loaders.started is not None
    if not in_epoch:
        loaders.restart_at = loaders.started
        restart_train_iteration(trainer)
    elif not batches.is_last_batch:  # or the next epoch begins it
        current: Any = batches.current
        states = loaders._state_dicts()
        loaders.restart_at = Place(loaders.started.epoch, int(current.processed))
        begin_anew_in_epoch(trainer, states)


def begin_anew_in_epoch(trainer: pl.Trainer, states: list[dict[str, Any]]) -> None:
    """Begin the training loader anew where the counters of the epoch are.

    Where the data have no length, and all that is left of them is passed over, the epoch is over.

    Args:
        trainer: Who fits.
        states: Of the loaders, if they have any.
    """
    is_open = is_accumulating(trainer)
    if not restart_in_epoch(trainer, states) and is_open:
        replace_window(trainer, trainer.lightning_module, {})
        rank_zero_warn(
            "ExactResume: what is left of this epoch's data is passed over, in mid-accumulation:"
            " the batches of the open window are left out, too."
        )


def check_begins_anew(trainer: pl.Trainer, where: str) -> None:
    """Refuse a training loader that cannot yield its batches once more.

    To be called in ``on_train_start``, by whoever wants to go back.

    Args:
        trainer: Who fits.
        where: Who wants to.

    Raises:
        ValueError: If it is an iterator, or loads from one.
    """
    loaders = train_loaders(trainer)
    for loader in loaders.flattened if loaders is not None else ():
        for part in (loader, getattr(loader, "dataset", None)):
            if isinstance(part, Iterator) and not is_stateful(loader):
                rule = "an iterator cannot be begun anew, and going back draws its batches again"
                way_out = "Give an object whose __iter__ begins at the first batch, such as a"
                way_out += " DataLoader, or one with state_dict and load_state_dict"
                name = type(part).__name__
                raise argument_error(where, "train_dataloader", name, rule, way_out)


def _skipping(trainer: pl.Trainer) -> Skipping | None:
    """What ExactResume knows, if the run has it."""
    found = (getattr(callback, "skipping", None) for callback in callbacks_of(trainer))
    return next((each for each in found if isinstance(each, Skipping)), None)
