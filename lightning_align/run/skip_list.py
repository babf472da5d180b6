"""The stream that a run trains on, told from others, and lists of what to leave out of it."""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len

from lightning_align._compat.lightning_resume import combined_length, train_loaders
from lightning_align.data.skip_list import check_stream, read_skip_list
from lightning_align.data.skipped import SkippedBatches
from lightning_align.run.loader import PositionedLoader
from lightning_align.run.protocols import told_stream
from lightning_align.run.replicas import replica
from lightning_align.run.skipping import skip_batches


def stream_of(trainer: pl.Trainer) -> dict[str, Any]:
    """What tells the stream of a run from others, as plain data: a batch's number is of a stream.

    A datamodule may say so itself, as ours do: seed, size of a batch and a fingerprint of the data.
    Of other data it is how many batches an epoch has, how its loaders are made, and the seed.

    Args:
        trainer: Who fits, from ``on_train_start`` on.
    """
    if (told := told_stream(trainer)) is not None:
        return told
    loaders = train_loaders(trainer)
    if not isinstance(loaders, PositionedLoader):
        return {}
    return {
        "epoch": combined_length(loaders),
        "loaders": list(map(_described, loaders.flattened)),
        "seed": loaders.seed,
        "replicas": replica(trainer)[0],
    }


def _described(loader: Any) -> dict[str, Any]:
    """How a loader is made."""
    sampler, data = getattr(loader, "sampler", None), getattr(loader, "dataset", None)
    return {
        "loader": type(loader).__name__,
        "batch_size": getattr(loader, "batch_size", None),
        "sampler": type(sampler).__name__,
        "dataset": type(data).__name__,
        "samples": sized_len(data),
    }


def follow_skip_list(trainer: pl.Trainer, path: str, where: str) -> SkippedBatches:
    """Pass over what a file lists, from where the run stands; to be called in ``on_train_start``.

    Args:
        trainer: Who fits.
        path: File or URL, read by rank zero.
        where: Who names it.

    Raises:
        ValueError: If it cannot be read, or is of other data.
    """
    found: Any = None
    if trainer.is_global_zero:
        try:
            listed, stream = read_skip_list(path, where)
            check_stream(where, path, stream, stream_of(trainer))
            found = listed.plain()
        except ValueError as error:
            found = str(error)
    found = trainer.strategy.broadcast(found)
    if isinstance(found, str):
        raise ValueError(found)
    return skip_batches(trainer, found)
