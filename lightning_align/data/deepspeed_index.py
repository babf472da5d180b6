"""Indices that DeepSpeed's DataAnalyzer has written, as ours.

A metric has three files, each a pair of .idx and .bin in Megatron's format: ``index_to_metric``
(the distinct difficulties in rising order), ``index_to_sample`` (the numbers of the samples of
each) and ``sample_to_metric`` (the difficulty of each sample). They are mapped where they are, and
nothing is copied but, where the third is missing or in another order, the difficulties.

Read in the code of DeepSpeed 0.19.8 (runtime/data_pipeline/data_sampling/indexed_dataset.py).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_align._errors import argument_error
from lightning_align.data.difficulty import DifficultyIndex

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")  # version, code of the dtype, items, documents
DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.uint16,
    7: np.uint32,
    8: np.uint64,
}


class _Items(NamedTuple):
    """Lists of numbers, one behind the other."""

    sizes: NDArray[np.int32]
    numbers: NDArray[Any]


def read_deepspeed_index(
    prefix: str | Path, *, where: str = "read_deepspeed_index", argument: str = "prefix"
) -> DifficultyIndex:
    """The index of a metric that DataAnalyzer or DistributedDataAnalyzer has reduced.

    DeepSpeed does not say which data it is of: its number of samples alone can be compared.

    Args:
        prefix: ``<save_path>/<metric>/<metric>``, what the names of its files begin with.
        where: Class the user called.
        argument: Name of the argument that holds ``prefix``.

    Raises:
        ValueError: If a file is missing or cut short, or they do not fit each other.
    """

    def error(rule: str) -> ValueError:
        return argument_error(where, argument, str(prefix), rule)

    path = Path(prefix).expanduser()
    levels = _read(path, "index_to_metric", error).numbers
    lists = _read(path, "index_to_sample", error)
    order = lists.numbers
    if len(levels) != len(lists.sizes) or (np.diff(levels.astype(np.int64)) <= 0).any():
        raise error("index_to_metric must name each list of index_to_sample once, in rising order")
    if len(order) == 0 or not _is_permutation(order):
        raise error("index_to_sample must hold each sample once")
    offsets = np.concatenate([[0], np.cumsum(lists.sizes, dtype=np.int64)])
    values = _values(path, levels, offsets, order, error)
    return DifficultyIndex(path.name, values, np.asarray(levels), offsets, order)


def open_index(
    path: str | Path, *, where: str = "open_index", argument: str = "path"
) -> DifficultyIndex:
    """An index of ours, or DeepSpeed's by what the names of its files begin with.

    Args:
        path: Folder of ours, or ``<save_path>/<metric>/<metric>`` of DeepSpeed's.
        where: Class the user called.
        argument: Name of the argument that holds ``path``.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    found = Path(path).expanduser()
    if found.with_name(f"{found.name}_index_to_sample.idx").exists():
        return read_deepspeed_index(found, where=where, argument=argument)
    return DifficultyIndex.open(found, where=where, argument=argument)


def _values(
    path: Path,
    levels: NDArray[Any],
    offsets: NDArray[np.int64],
    order: NDArray[Any],
    error: Any,
) -> NDArray[Any]:
    """The difficulty of each sample, mapped if there is a file that says the same as the lists.

    With shuffled samples (``sample_indices``, or an ``index`` in the batch), the file has them in
    the order in which they were looked at.
    """
    if path.with_name(f"{path.name}_sample_to_metric.idx").exists():
        values = _read(path, "sample_to_metric", error).numbers
        lists = zip(levels, offsets[:-1], offsets[1:], strict=True)
        if len(values) == len(order) and all(
            (values[order[begin:end]] == level).all() for level, begin, end in lists
        ):
            return values
    values = np.empty(len(order), levels.dtype)
    values[order] = np.repeat(levels, np.diff(offsets))
    return values


def _is_permutation(order: NDArray[Any]) -> bool:
    seen = np.zeros(len(order), bool)
    if int(order.max()) >= len(order) or int(order.min()) < 0:
        return False
    seen[order] = True
    return bool(seen.all())


def _read(path: Path, part: str, error: Any) -> _Items:
    index = path.with_name(f"{path.name}_{part}.idx")
    binary = path.with_name(f"{path.name}_{part}.bin")
    begin = len(MAGIC) + HEADER.size
    try:
        with index.open("rb") as stream:
            head = stream.read(begin)
        if len(head) < begin or head[: len(MAGIC)] != MAGIC:
            raise error(f"{index.name} is no index of DeepSpeed's")
        version, code, num_items, _ = HEADER.unpack(head[len(MAGIC) :])
        if version != 1 or code not in DTYPES:
            raise error(f"{index.name} has version {version} and dtype {code}, which is not known")
        sizes = np.fromfile(index, np.int32, num_items, offset=begin)
        size, dtype = binary.stat().st_size, np.dtype(DTYPES[code])
    except OSError as fault:
        raise error(f"{Path(fault.filename).name} cannot be read ({fault.strerror})") from fault
    expected = int(sizes.sum(dtype=np.int64)) * dtype.itemsize
    if len(sizes) != num_items or (sizes < 0).any() or size != expected:
        raise error(f"{index.name} and {binary.name} do not fit: one of them was cut short")
    numbers = np.memmap(binary, dtype, "r") if size else np.empty(0, dtype)
    return _Items(sizes, numbers)
