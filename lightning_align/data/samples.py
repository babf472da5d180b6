"""From the records of files to samples: one format per file, and what cannot teach is counted."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lightning_align.data.columns import read_records
from lightning_align.data.files import InputFile

BATCH_RECORDS = 1000  # records tokenised at once

Ids = NDArray[np.int32]
Record = tuple[str, dict[str, Any]]  # place in the file, and columns
Sample = TypeVar("Sample")


def read_samples(
    files: Sequence[InputFile],
    read: Callable[[InputFile], Iterable[Sample | str]],
    what: str,
    lost: Counter[str] | None = None,
) -> list[Sample]:
    """All usable samples of ``files``; one warning counts the others, and what was cut.

    It names the columns that nobody looked at, too.

    Args:
        files: Files to read.
        read: Yields the samples of a file, or in place of one why it cannot be used.
        what: The samples in a word, for errors and warnings.
        lost: Rows by what they have lost, counted while ``read`` is at work.

    Raises:
        ValueError: If a file is empty, or no sample is left.
    """
    samples: list[Sample] = []
    dropped: Counter[str] = Counter()
    for file in files:
        number = len(samples) + dropped.total()
        for sample in read(file):
            if isinstance(sample, str):
                dropped[sample] += 1
            else:
                samples.append(sample)
        if number == len(samples) + dropped.total():
            raise file.error(f"is empty, and must hold {what}")
    told = []
    first = files[0]
    passed_over = ", ".join(map(repr, sorted(first.columns.unread)))
    if passed_over:
        told.append(f"columns that are not read: {passed_over}")
    if dropped:
        reasons = "; ".join(f"{count} because {reason}" for reason, count in dropped.items())
        total = len(samples) + dropped.total()
        told.append(f"{dropped.total()} of {total} {what} dropped: {reasons}")
        if not samples:
            raise first.error(f"nothing is left ({'. '.join(told)})")
    if lost:
        parts = "; ".join(f"{count} lost {part}" for part, count in lost.items())
        told.append(f"{lost.total()} row(s) cut to max_length: {parts}")
    if told:
        where = f"{first.where}({first.argument}={first.url!r})"
        warnings.warn(f"{where}: {'. '.join(told)}", stacklevel=2)
    return samples


def records_of_one_format(
    file: InputFile,
    format_of: Callable[[InputFile, str, dict[str, Any]], str],
    known: Sequence[str],
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Format, place and content of each record, under our names of the columns ``known``.

    Raises:
        ValueError: If a record has another format than the first.
    """
    first = None
    for place, record in read_records(file, known):
        found = format_of(file, place, record)
        first = first or (found, place)
        if found != first[0]:
            rule = f"{place} holds {found}, but {first[1]} {first[0]}, and a file has one format"
            raise file.error(rule, "Write them to two files")
        yield found, place, record


def batches_of_one_format(
    file: InputFile,
    format_of: Callable[[InputFile, str, dict[str, Any]], str],
    known: Sequence[str],
) -> Iterator[tuple[str, list[Record]]]:
    """The format of a file with the records that are tokenised at once, batch by batch."""
    records = records_of_one_format(file, format_of, known)
    while batch := list(islice(records, BATCH_RECORDS)):
        yield batch[0][0], [record[1:] for record in batch]


def close(ids: Iterable[int], eos_token_id: int | None) -> Ids:
    """``ids`` with the end-of-text token behind them, once; as they are if it is None."""
    closed = list(ids)
    if eos_token_id is not None and closed[-1:] != [eos_token_id]:
        closed.append(eos_token_id)
    return np.array(closed, dtype=np.int32)


def common_length(first: list[Any], second: list[Any]) -> int:
    """How many items two lists have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
