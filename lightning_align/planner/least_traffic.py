"""The least that a region of a step moves, if it were one perfect kernel.

It reads what comes from outside once, keeps all that is made inside where it is computed, and
writes what is used outside. Forward, recomputation, backward and update are regions of their own:
what forward leaves for backward goes through memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from lightning_align.planner.records import Record, Region

Uses = Mapping[int, Sequence[int]]


def reads_of(records: Sequence[Record]) -> Uses:
    """Storage -> numbers of the operations that read it."""
    found: dict[int, list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        for region in record.reads:
            found[region.storage].append(number)
    return found


def least_bytes(
    records: Sequence[Record], inside: Sequence[int], reads: Uses, sizes: Sequence[int]
) -> int:
    """Bytes that the operations ``inside`` would move if they were one.

    Args:
        records: All operations of the step.
        inside: Numbers of those of the region, in order.
        reads: As ``reads_of`` gives it.
        sizes: Bytes of each storage.
    """
    made: set[int] = set()
    taken: set[Region] = set()
    given: set[Region] = set()
    for number in inside:
        record = records[number]
        for region in record.reads:
            if region[0] not in made:  # the storage
                taken.add(region)
        for region in record.writes:
            made.add(region[0])
            given.add(region)
    members = set(inside)
    outside = {region[0] for region in taken}
    leaves = outside | {
        storage for storage in made - outside if _is_left(members, inside, reads.get(storage, ()))
    }
    return _bytes(taken, sizes) + _bytes([each for each in given if each[0] in leaves], sizes)


def _bytes(regions: Iterable[Region], sizes: Sequence[int]) -> int:
    """Of all of them, and no more of a storage than it has."""
    found: dict[int, int] = {}
    for storage, _, nbytes in regions:
        found[storage] = found.get(storage, 0) + nbytes
    return sum([min(nbytes, sizes[storage]) for storage, nbytes in found.items()])


def _is_left(members: set[int], inside: Sequence[int], readers: Sequence[int]) -> bool:
    """Whether a storage is read after the region began and outside of it, or not inside."""
    if not readers or readers[-1] > inside[-1]:
        return True
    is_read_inside = False
    for number in readers:
        if number in members:
            is_read_inside = True
        elif number > inside[0]:
            return True
    return not is_read_inside
