"""Batches of a stream that a run passes over: sorted ranges, and what they do to counting.

A run counts the batches that it has trained; its stream counts all of them. With ranges of the
stream that are left out either count gives the other: ``position_of`` goes from the batches that
are kept to the stream, ``kept_before`` back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from lightning_align._errors import argument_error


@dataclass(frozen=True)
class SkippedBatches:
    """Ranges ``[first, last)`` of batch numbers that are passed over.

    They are kept sorted and disjoint; ranges that meet become one, and empty ones none.

    Args:
        ranges: Pairs of the first number that is left out and the next one that is not.

    Raises:
        ValueError: If a range is no pair of whole numbers, negative, or ends before it begins.

    Example:
        >>> skipped = SkippedBatches([(2, 4)])
        >>> [skipped.position_of(n) for n in range(4)]
        [0, 1, 4, 5]
    """

    ranges: tuple[tuple[int, int], ...] = ()
    # Of each range: how many batches are kept before it, and how many skipped before its end.
    _kept: list[int] = field(init=False, repr=False, compare=False)
    _skipped: list[int] = field(init=False, repr=False, compare=False)

    def __init__(self, ranges: Iterable[Iterable[int]] = ()) -> None:
        merged = _merged(_checked(pair) for pair in ranges)
        skipped = list(accumulate(last - first for first, last in merged))
        before = [0, *skipped]
        kept = [first - gone for (first, _), gone in zip(merged, before, strict=False)]
        for name, value in (("ranges", merged), ("_kept", kept), ("_skipped", skipped)):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, value: SkippedBatches | Iterable[Iterable[int]] | int) -> SkippedBatches:
        """From ranges, or from a number of batches that are passed over before the first."""
        if isinstance(value, SkippedBatches):
            return value
        return cls([(0, value)]) if isinstance(value, int) else cls(value)

    def __bool__(self) -> bool:
        """Whether any batch is passed over."""
        return bool(self.ranges)

    def __len__(self) -> int:
        """How many batches are passed over."""
        return self._skipped[-1] if self._skipped else 0

    def __contains__(self, position: int) -> bool:
        """Whether batch ``position`` is passed over."""
        return self.position_of(self.kept_before(position)) != position

    def __or__(self, other: SkippedBatches) -> SkippedBatches:
        """What either passes over."""
        return SkippedBatches([*self.ranges, *other.ranges])

    def position_of(self, kept: int) -> int:
        """Number of the batch that follows ``kept`` batches which are not passed over."""
        number = bisect_right(self._kept, kept)
        return kept + (self._skipped[number - 1] if number else 0)

    def kept_before(self, position: int) -> int:
        """How many batches before ``position`` are not passed over."""
        return position - self.skipped_before(position)

    def skipped_before(self, position: int) -> int:
        """How many batches before ``position`` are passed over."""
        number = bisect_right(self.ranges, position, key=lambda pair: pair[0])
        if not number:
            return 0
        return self._skipped[number - 1] - max(0, self.ranges[number - 1][1] - position)

    def kept_from(self, position: int) -> Iterator[int]:
        """The numbers from ``position`` on that are not passed over, without end."""
        kept = self.kept_before(position)
        while True:
            yield self.position_of(kept)
            kept += 1

    def behind(self, position: int) -> SkippedBatches:
        """What of them is at ``position`` or later."""
        return SkippedBatches(
            (max(first, position), last) for first, last in self.ranges if last > position
        )

    def shifted(self, by: int) -> SkippedBatches:
        """The same ranges ``by`` batches later, without what would be before the first batch."""
        return SkippedBatches(
            (max(0, first + by), last + by) for first, last in self.ranges if last + by > 0
        )

    def plain(self) -> list[list[int]]:
        """The ranges as plain data, for a checkpoint or JSON."""
        return [list(pair) for pair in self.ranges]


def _checked(pair: Iterable[int]) -> tuple[int, int]:
    """A range as a pair.

    Raises:
        ValueError: If it is none.
    """
    ends = tuple(pair) if isinstance(pair, Iterable) else (pair,)
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not whole or not 0 <= ends[0] <= ends[1]:
        rule = "must be pairs (first, last) of whole numbers, 0 <= first <= last"
        way_out = "A range leaves out batches first to last - 1"
        raise argument_error("SkippedBatches", "ranges", pair, rule, way_out)
    return ends[0], ends[1]


def _merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pair for pair in ranges if pair[0] < pair[1]):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return tuple(merged)
