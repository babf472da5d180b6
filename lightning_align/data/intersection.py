"""Samples by the step at which all of several measures let them in.

That takes seconds and six bytes a sample where there are many. So of indices that lie in folders
it is written once, into the folder of the first, for this configuration in place of another one's,
and mapped from there. Whoever opens the index with all its hashes compares those of this too.

Shapes: N samples, E steps.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lightning_align.data.whole_folder import MANIFEST, FileWriter, problem_of, write_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Samples = NDArray[np.integer[Any]]
    Counts = Mapping[str, Sequence[tuple[int, int]]]

KEPT_FROM = 1 << 22  # samples; fewer are quicker than a file is worth
_PREFIX = "intersection-"
_CHUNK = 1 << 20


class Ordered(Protocol):
    """What has samples by difficulty."""

    @property
    def order(self) -> Samples:
        """Samples by difficulty, (N,)."""
        ...


def intersected(
    indices: Mapping[str, Ordered], counts: Counts, steps: list[int]
) -> tuple[Samples, NDArray[np.int64]]:
    """Samples by the step at which all measures let them in, and how many at each, (E,).

    Args:
        indices: For each measure, the samples by difficulty.
        counts: For each measure, how many are eligible from which step on.
        steps: All of these steps, rising.
    """
    found_in = {name: getattr(index, "folder", None) for name, index in indices.items()}
    folders = {name: folder for name, folder in found_in.items() if folder is not None}
    many = len(next(iter(indices.values())).order)
    if len(folders) < len(indices) or many < KEPT_FROM:
        return _computed(indices, counts, steps)
    with suppress(OSError):  # another run may write its own in place of it
        key = _key(folders, counts)
        kept = _kept(folders, key)
        if problem_of(kept, key, read_all=False) is None:
            sizes = json.loads((kept / MANIFEST).read_text())["sizes"]
            return np.memmap(kept / "order", np.int32, "r"), np.array(sizes)
    found = _computed(indices, counts, steps)
    with suppress(OSError):  # no place for it, or it may not be written: what is in memory does
        key = _key(folders, counts)
        _keep(_kept(folders, key), key, *found)
    return found


def drop_damaged(folder: Path) -> None:
    """Remove what was kept in the folder of an index and is not what was written."""
    for kept in folder.glob(f"{_PREFIX}*"):
        key = kept.name.removeprefix(_PREFIX)
        if "." not in key and problem_of(kept, key) is not None:
            shutil.rmtree(kept, ignore_errors=True)


def _kept(folders: Mapping[str, Path], key: str) -> Path:
    return next(iter(folders.values())) / f"{_PREFIX}{key}"


def _key(folders: Mapping[str, Path], counts: Counts) -> str:
    """What decides the result: the content of the indices, and who is eligible when."""
    facts = [(name, (folders[name] / MANIFEST).read_text(), [*counts[name]]) for name in folders]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _keep(kept: Path, key: str, samples: Samples, sizes: NDArray[np.int64]) -> None:
    """Write it, in place of what other configurations have left. Others may write it as well."""

    def write(folder: Path) -> dict[str, Any]:
        writer = FileWriter(folder / "order")
        for first in range(0, len(samples), _CHUNK):
            writer.write(samples[first : first + _CHUNK].tobytes())
        return {"files": {"order": writer.close()}, "sizes": sizes.tolist()}

    own = kept.with_name(f"{kept.name}.{uuid.uuid4().hex}")
    try:
        write_whole(own, key, write)
        for other in kept.parent.glob(f"{_PREFIX}*"):
            if "." not in other.name:
                shutil.rmtree(other, ignore_errors=True)
        own.rename(kept)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _computed(
    indices: Mapping[str, Ordered], counts: Counts, steps: list[int]
) -> tuple[Samples, NDArray[np.int64]]:
    num_samples = len(next(iter(indices.values())).order)
    # A thousand levels for each of at most 65 measures.
    level_N = np.zeros(num_samples, dtype=np.uint16)
    for name, index in indices.items():
        begin = 0
        for step, count in counts[name]:
            _raise_to(level_N, index.order, begin, count, steps.index(step))
            begin = count
        _raise_to(level_N, index.order, begin, num_samples, len(steps))
    sizes = np.bincount(level_N, minlength=len(steps) + 1)
    samples: Samples = np.empty(num_samples, dtype=np.int32)
    next_E = np.cumsum(sizes) - sizes
    for first in range(0, num_samples, _CHUNK):  # sorted by counting: nothing of 8 bytes a sample
        chunk = level_N[first : first + _CHUNK]
        by_level = np.argsort(chunk, kind="stable")
        in_chunk = np.bincount(chunk, minlength=len(sizes))
        offsets = np.repeat(next_E - (np.cumsum(in_chunk) - in_chunk), in_chunk)
        samples[offsets + np.arange(len(chunk))] = first + by_level
        next_E += in_chunk
    return samples, sizes[:-1]


def _raise_to(
    level_N: NDArray[np.uint16], order: Samples, begin: int, end: int, number: int
) -> None:
    for first in range(begin, end, _CHUNK):
        chosen = order[first : min(first + _CHUNK, end)]
        level_N[chosen] = np.maximum(level_N[chosen], number)
