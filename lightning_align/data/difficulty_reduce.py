"""From the difficulty of each sample to the samples by difficulty, out of core.

The difficulties pass by in pieces, three times: for their range, for their levels, and to put every
sample in its place. Only one piece and the counts are in memory, and of the result the pages that
the system likes to keep.

Shapes: N samples, C samples of a piece, L levels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_align._errors import argument_error
from lightning_align.data.difficulty import (
    FORMAT,
    MAX_LEVELS,
    checked_values,
    sample_dtype,
    whole_dtype,
)
from lightning_align.data.whole_folder import DISK_FULL, FileWriter, hash_of, write_whole

PIECE = 1 << 22  # samples at a time
DRAWN = 1 << 20  # about so many values decide where levels end, where there are too many

Pieces = Callable[[], Iterable[NDArray[Any]]]


class Range(NamedTuple):
    """How many difficulties there are, the least and the greatest, and what holds them all."""

    num_samples: int
    low: Any
    high: Any
    dtype: np.dtype[Any]


class Levels(NamedTuple):
    """Where levels are.

    Attributes:
        ends: The greatest difficulty of each, (L,).
        counts: Samples of each, (L,).
        joined: Whether there are more difficulties than levels.
        whole: Whether they are all whole numbers from the least on: what is looked up fastest.
    """

    ends: NDArray[Any]
    counts: NDArray[np.int64]
    joined: bool
    whole: bool

    def of(self, values_C: NDArray[Any]) -> NDArray[np.uint16]:
        """The level of each value, counted from 0."""
        if self.whole:
            above_C = values_C - self.ends[0].astype(values_C.dtype)
            # In int8, 127 - -128 wraps around; the same bits without a sign are right.
            plain_C: NDArray[Any] = above_C.view(f"u{above_C.itemsize}")
            return plain_C.astype(np.uint16)
        level_C: NDArray[np.uint16] = np.searchsorted(self.ends, values_C).astype(np.uint16)
        return level_C


def build_index(
    folder: Path,
    name: str,
    pieces: Pieces,
    *,
    fingerprint: str | None = None,
    where: str = "build_index",
) -> None:
    """Write the index of difficulties; nobody else may write the same at the same time.

    Args:
        folder: Where it will be, in place of one that is there.
        name: Of the metric.
        pieces: Gives the difficulties in the order of the samples, in arrays of any length; it is
            called several times and must give the same.
        fingerprint: Of the data.
        where: What the user called.

    Raises:
        ValueError: If they are not finite numbers, or all the same.
        OSError: If the disk is full. Nothing of the index is left, then; an older one is as it was.
    """
    span = _range(where, name, pieces())
    levels = _levels(span, pieces)

    def write(temporary: Path) -> dict[str, Any]:
        arrays = _write(temporary, span, levels, _regrouped(span, pieces()))
        about = {"name": name, "joined": levels.joined, "fingerprint": fingerprint}
        return about | arrays

    try:
        write_whole(folder, FORMAT, write)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        message = (
            f"{where}: the disk is full ({error.strerror}). No part of this index was kept; what"
            " was computed of the samples is. Free some space, and go on"
        )
        raise OSError(error.errno, message, str(folder.parent)) from error


def _range(where: str, name: str, pieces: Iterable[NDArray[Any]]) -> Range:
    num_samples, lows, highs, kinds = 0, [], [], set()
    for values_C in pieces:
        checked_C = checked_values(where, name, values_C, first=num_samples)
        num_samples += len(checked_C)
        lows.append(checked_C.min())
        highs.append(checked_C.max())
        kinds.add(checked_C.dtype.kind)
    if num_samples == 0:
        raise argument_error(where, name, [], "there is no sample")
    low, high = min(lows), max(highs)
    if low == high:
        rule = f"is the difficulty of all {num_samples} samples, so that none comes first"
        raise argument_error(where, name, low.item(), rule, "Choose another metric")
    if "f" in kinds:
        return Range(num_samples, low, high, np.dtype(np.float32))
    return Range(num_samples, int(low), int(high), whole_dtype(int(low), int(high)))


def _regrouped(span: Range, pieces: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """The same numbers, of one type, in arrays of PIECE: sorting pays by the length."""
    waiting: list[NDArray[Any]] = []
    count = 0
    for piece in pieces:
        rest = np.asarray(piece).astype(span.dtype, copy=False)
        while count + len(rest) >= PIECE:
            waiting.append(rest[: PIECE - count])
            rest = rest[PIECE - count :]
            yield np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
            waiting, count = [], 0
        if len(rest):
            waiting.append(rest)
            count += len(rest)
    if waiting:
        yield np.concatenate(waiting)


def _levels(span: Range, pieces: Pieces) -> Levels:
    if span.dtype.kind != "f" and span.high - span.low < MAX_LEVELS:
        ends = np.arange(span.low, span.high + 1)
        return _counted(ends, False, True, _regrouped(span, pieces()))
    distinct: NDArray[Any] | None = np.empty(0, span.dtype)
    drawn = [np.array([span.high], span.dtype)]
    step = max(1, span.num_samples // DRAWN)
    for values_C in _regrouped(span, pieces()):
        drawn.append(values_C[::step].copy())
        if distinct is not None:
            distinct = np.union1d(distinct, values_C)
            distinct = distinct if len(distinct) <= MAX_LEVELS else None
    if distinct is not None:
        return _counted(distinct, False, False, _regrouped(span, pieces()))
    # Every end is a difficulty that occurs, so it is the greatest of its level.
    sorted_values = np.sort(np.concatenate(drawn))
    places = np.linspace(0, len(sorted_values) - 1, MAX_LEVELS).round().astype(np.int64)
    ends = np.unique(sorted_values[places])
    return _counted(ends, True, False, _regrouped(span, pieces()))


def _counted(
    ends: NDArray[Any], joined: bool, whole: bool, pieces: Iterable[NDArray[Any]]
) -> Levels:
    levels = Levels(ends, np.zeros(len(ends), np.int64), joined, whole)
    for values_C in pieces:
        levels.counts[:] += np.bincount(levels.of(values_C), minlength=len(ends))
    return levels


def _write(
    folder: Path, span: Range, levels: Levels, pieces: Iterable[NDArray[Any]]
) -> dict[str, Any]:
    """Write the files; returns what a manifest says of them."""
    order_dtype = sample_dtype(span.num_samples)
    values = FileWriter(folder / "values")
    order = _allocated(folder / "order", span.num_samples, order_dtype)
    next_L = np.cumsum(levels.counts) - levels.counts  # the place of the next sample of each level
    first = 0
    for values_C in pieces:
        values.write(values_C.tobytes())
        _place(order, next_L, levels.of(values_C), first)
        first += len(values_C)
    order.flush()
    del order
    present = levels.counts > 0
    ends = levels.ends[present]
    files = {"values": values.close(), "order": _stored(folder / "order")}
    rest = {"levels": ends, "offsets": np.cumsum([0, *levels.counts[present]], dtype=np.int64)}
    for name, array in rest.items():
        writer = FileWriter(folder / name)
        writer.write(array.tobytes())
        files[name] = writer.close()
    written = {"values": span.dtype, "order": order_dtype}
    written |= {name: array.dtype for name, array in rest.items()}
    return {"files": files, "dtypes": {name: dtype.str for name, dtype in written.items()}}


def _place(
    order: NDArray[Any], next_L: NDArray[np.int64], level_C: NDArray[np.uint16], first: int
) -> None:
    """Put the samples from ``first`` on behind those of their levels that are there already."""
    counts_L = np.bincount(level_C, minlength=len(next_L))
    sample_C = np.argsort(level_C, kind="stable")  # 16 bits: NumPy sorts by radix
    # Behind sorting, samples of a level lie side by side, as they will in the order.
    place_C = np.repeat(next_L - (np.cumsum(counts_L) - counts_L), counts_L)
    place_C += np.arange(len(level_C))
    sample_C += first
    order[place_C] = sample_C
    next_L += counts_L


def _allocated(path: Path, size: int, dtype: np.dtype[Any]) -> np.memmap[Any, Any]:
    """A mapped file of that size: what is mapped of a file on a full disk kills whoever writes."""
    nbytes = size * dtype.itemsize
    with path.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, nbytes)
        else:
            for begin in range(0, nbytes, 1 << 20):
                stream.write(bytes(min(1 << 20, nbytes - begin)))
    return np.memmap(path, dtype=dtype, mode="r+", shape=(size,))


def _stored(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"size": path.stat().st_size, "hash": hash_of(path)}
