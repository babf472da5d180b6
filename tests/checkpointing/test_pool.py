"""Which buffer the next save is copied into, and what is in the others."""

from lightning_align.checkpointing.pool import Snapshot, SnapshotPool


def full(limit: int) -> tuple[SnapshotPool, list[Snapshot]]:
    """Saves 0, 1, ... that are being written."""
    pool = SnapshotPool(limit)
    taken = []
    for number in range(limit):
        snapshot = pool.take()
        assert snapshot is not None
        snapshot.name, snapshot.number, snapshot.pending = f"save{number}", number, True
        taken.append(snapshot)
    return pool, taken


def test_there_are_no_more_than_the_limit() -> None:
    pool, taken = full(3)
    assert len(set(map(id, taken))) == len({id(each.buffer) for each in taken}) == 3
    assert not pool.has_room()
    assert pool.take() is None
    assert pool.pending == {"save0", "save1", "save2"}


def test_the_oldest_that_is_written_is_used_again() -> None:
    pool, taken = full(3)
    for written in (2, 1):
        taken[written].pending = False
    assert pool.has_room()
    assert pool.pending == {"save0"}
    assert pool.take() is taken[1]


def test_a_new_one_is_taken_before_one_that_holds_something() -> None:
    pool = SnapshotPool(2)
    first = pool.take()
    assert first is not None
    first.number = 0
    assert pool.take() is not first


def test_the_newest_come_first_and_what_is_not_whole_not_at_all() -> None:
    pool, taken = full(4)
    taken[3].number = -1  # being copied into
    assert pool.newest(2) == [taken[2], taken[1]]
    assert pool.newest(9) == [taken[2], taken[1], taken[0]]
