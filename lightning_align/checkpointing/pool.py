"""The buffers of an engine, and what is in each: used in turn, and no more than asked for."""

from dataclasses import dataclass, field
from typing import Any

from lightning_align.checkpointing.snapshot import HostBuffer


@dataclass(eq=False)
class Snapshot:
    """A buffer and what is in it."""

    buffer: HostBuffer = field(default_factory=HostBuffer)
    structure: Any = None
    name: str = ""
    step: int = -1
    metadata: dict[str, Any] = field(default_factory=dict)
    number: int = -1  # of the save; -1: nothing whole in it
    pending: bool = False  # queued or being written

    def empty(self) -> None:
        """Nothing whole is in it any more; its memory stays, files that it showed do not."""
        self.buffer.let_go()
        self.structure, self.number = None, -1

    def written(self) -> None:
        """It is written, or will not be: files that it showed are no longer held."""
        if self.buffer.let_go():
            self.structure, self.number = None, -1
        self.pending = False


class SnapshotPool:
    """Up to ``limit`` snapshots.

    Args:
        limit: How many there may be.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._snapshots: list[Snapshot] = []

    @property
    def pending(self) -> set[str]:
        """Names of those that are not written yet."""
        return {each.name for each in self.waiting}

    @property
    def waiting(self) -> list[Snapshot]:
        """Those that are not written yet."""
        return [each for each in self._snapshots if each.pending]

    def has_room(self) -> bool:
        """Whether there is one to copy into."""
        return len(self._snapshots) < self._limit or any(
            not each.pending for each in self._snapshots
        )

    def take(self) -> Snapshot | None:
        """One to copy into: a new one while there may be more, else the oldest written one."""
        if len(self._snapshots) < self._limit:
            self._snapshots.append(Snapshot())
            return self._snapshots[-1]
        free = [each for each in self._snapshots if not each.pending]
        return min(free, key=lambda each: each.number, default=None)

    def newest(self, count: int) -> list[Snapshot]:
        """Those that hold something whole, the newest first.

        Args:
            count: How many at most.
        """
        whole = [each for each in self._snapshots if each.number >= 0]
        return sorted(whole, key=lambda each: each.number, reverse=True)[:count]
