"""The least that a region of a step moves, if it were one perfect kernel.

It reads what comes from outside once, keeps all that is made inside where it is computed, and
writes what is used outside. Forward, recomputation, backward and update are regions of their own:
what forward leaves for backward goes through memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

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
    members, made = set(inside), set()
    taken: dict[int, set[Region]] = defaultdict(set)
    given: dict[int, set[Region]] = defaultdict(set)
    for number in inside:
        for region in records[number].reads:
            if region.storage not in made:
                taken[region.storage].add(region)
        for region in records[number].writes:
            made.add(region.storage)
            given[region.storage].add(region)
    first = min(members, default=0)
    leaves = {
        storage: regions
        for storage, regions in given.items()
        if storage in taken or _is_left(members, first, reads.get(storage, ()))
    }
    return sum(
        min(sum(region.bytes for region in regions), sizes[storage])
        for uses in (taken, leaves)
        for storage, regions in uses.items()
    )


def _is_left(members: set[int], first: int, readers: Sequence[int]) -> bool:
    """Whether a storage is read after the region began and outside of it, or not inside."""
    is_read_inside = False
    for number in readers:
        if number in members:
            is_read_inside = True
        elif number > first:
            return True
    return not is_read_inside
