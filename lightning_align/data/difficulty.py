"""The difficulty of every sample, and the samples by difficulty: what a curriculum draws from.

An index is a folder of four files, memory-mapped: the difficulty of each sample in the order of the
data, the distinct difficulties (levels) in rising order, and the numbers of the samples level by
level. ``difficulty_map`` computes difficulties, ``difficulty_reduce`` makes the index of them.

Shapes: N samples, L levels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Self

from lightning_align._errors import argument_error, check_least
from lightning_align.data.intersection import drop_damaged
from lightning_align.data.whole_folder import MANIFEST, problem_of

FORMAT = "difficulty index 1"
MAX_LEVELS = 1 << 16  # a level number takes two bytes; finer difficulties share a level
FILES = ("values", "levels", "offsets", "order")

Samples: TypeAlias = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class DifficultyIndex:
    """Samples by difficulty.

    Args:
        name: Of the metric.
        values: Difficulty of each sample, (N,).
        levels: Difficulties in rising order, (L,); where finer ones were joined, a level is named
            by its greatest, so that what is at most a level is never harder than it says.
        offsets: Level i is ``order[offsets[i]:offsets[i + 1]]``, (L + 1,).
        order: Numbers of the samples, level by level and rising inside one, (N,).
        joined: Whether there are more difficulties than levels.
        fingerprint: Of the data, as whoever built the index gave it; None if nobody did.
        folder: Where the arrays are mapped from; it travels to other processes as this path.
    """

    name: str
    values: NDArray[Any]
    levels: NDArray[Any]
    offsets: NDArray[np.int64]
    order: Samples
    joined: bool = False
    fingerprint: str | None = None
    folder: Path | None = None

    @classmethod
    def of_values(
        cls, values: ArrayLike, *, name: str = "difficulty", where: str = "DifficultyIndex"
    ) -> Self:
        """The index of difficulties in memory.

        Args:
            values: Of the samples, in their order, (N,).
            name: Of the metric.
            where: Class the user called.

        Raises:
            ValueError: If they are not one finite number a sample.
        """
        values_N = checked_values(where, name, values)
        order: Samples = np.argsort(values_N, kind="stable").astype(sample_dtype(len(values_N)))
        levels, first = np.unique(values_N[order], return_index=True)
        offsets = np.append(first, len(values_N))
        return cls(name, values_N, levels, offsets, order).merged(MAX_LEVELS)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        where: str = "DifficultyIndex",
        argument: str = "folder",
        verify: bool = True,
    ) -> Self:
        """Open the index that was built in a folder.

        Args:
            folder: Where it is.
            where: Class the user called.
            argument: Name of the argument that holds ``folder``.
            verify: Whether to read all of it and compare hashes, or to compare sizes alone.

        Raises:
            ValueError: If there is none, or it was cut short or changed.
        """
        folder = Path(folder).expanduser()
        problem = problem_of(folder, FORMAT, read_all=verify)
        if problem is not None:
            rule = f"is no usable difficulty index ({problem})"
            way_out = "Build it with `lightning-align difficulty`"
            raise argument_error(where, argument, str(folder), rule, way_out)
        if verify:
            drop_damaged(folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        arrays = {
            name: np.memmap(folder / name, dtype=manifest["dtypes"][name], mode="r")
            for name in FILES
        }
        return cls(
            name=manifest["name"],
            joined=manifest["joined"],
            fingerprint=manifest["fingerprint"],
            folder=folder,
            **arrays,
        )

    @property
    def num_samples(self) -> int:
        """Number of samples that it is of."""
        return len(self.values)

    def samples(self, level: int) -> Samples:
        """Numbers of the samples of a level."""
        return self.order[self.offsets[level] : self.offsets[level + 1]]

    def merged(self, max_levels: int) -> Self:
        """The same order with neighbouring levels joined, each of about as many samples.

        Args:
            max_levels: How many levels there may be.

        Raises:
            ValueError: If ``max_levels`` is below 1.
        """
        check_least("DifficultyIndex.merged", 1, max_levels=max_levels)
        if len(self.levels) <= max_levels:
            return self
        # The first level that reaches each k-th part of the samples ends a joined one.
        parts = self.num_samples * np.arange(1, max_levels + 1) // max_levels
        last = np.unique(np.searchsorted(self.offsets[1:], parts, side="left"))
        offsets = np.concatenate([[0], self.offsets[1:][last]])
        levels = np.asarray(self.levels[last])
        return replace(self, levels=levels, offsets=offsets, joined=True, folder=None)

    def check_data(
        self, where: str, argument: str, num_samples: int, fingerprint: str | None = None
    ) -> None:
        """Refuse other data than the index is of.

        Args:
            where: Class the user called.
            argument: Name of the argument that holds the index.
            num_samples: How many samples there are.
            fingerprint: Of the data; only the number is compared where either is None.

        Raises:
            ValueError: If they are others.
        """
        shown = str(self.folder) if self.folder is not None else self.name
        way_out = "Build the index anew: what was computed of the same samples is not done again"
        if num_samples != self.num_samples:
            rule = f"is of {self.num_samples} samples, and there are {num_samples}"
            raise argument_error(where, argument, shown, rule, way_out)
        if fingerprint is not None and self.fingerprint not in (None, fingerprint):
            rule = f"is of other data: of {self.fingerprint!r}, and this is {fingerprint!r}"
            raise argument_error(where, argument, shown, rule, way_out)

    def __getstate__(self) -> dict[str, Any]:
        if self.folder is None:
            return self.__dict__
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened = state
        if state.keys() == {"folder"}:
            opened = type(self).open(state["folder"], verify=False).__dict__
        self.__dict__.update(opened)


def sample_dtype(num_samples: int) -> np.dtype[Any]:
    """The narrowest type for numbers of samples."""
    return np.dtype(np.int32 if num_samples < 2**31 else np.int64)


def whole_dtype(low: int, high: int) -> np.dtype[Any]:
    """The narrowest type for whole numbers from ``low`` to ``high``."""
    return np.min_scalar_type(high if low >= 0 else min(low, -high - 1))


def checked_values(where: str, name: str, values: ArrayLike, *, first: int = 0) -> NDArray[Any]:
    """Difficulties as an array of whole or floating-point numbers, (N,).

    Args:
        where: Class the user called.
        name: Of the metric.
        values: What is said to be the difficulties of samples, in their order.
        first: Number of the first of these samples.

    Raises:
        ValueError: If they are not one finite number a sample.
    """
    values_N = np.asarray(values)
    if values_N.ndim != 1 or len(values_N) == 0 or values_N.dtype.kind not in "iuf":
        shown = f"{values_N.dtype} of shape {values_N.shape}"
        rule = "must be one number for each sample, and at least one"
        raise argument_error(where, name, shown, rule)
    if values_N.dtype.kind == "f" and not (finite_N := np.isfinite(values_N)).all():
        sample = int(np.argmin(finite_N))
        rule = f"must be finite; sample {first + sample} is the first that is not"
        raise argument_error(where, name, float(values_N[sample]), rule)
    return values_N
