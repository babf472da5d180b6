"""Which blocks are in memory: read before they are needed, given up when others are.

The order of a step is the order of the step before, so what comes next is known and read while the
present block computes. Given up is what was used longest ago; that is safe at any moment, because
whoever needs the values again fetches them, and whoever still looks at them keeps their memory.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import Transfer
from lightning_align.offload.store import ShardStore


class Residents:
    """The blocks that are in memory now.

    Args:
        store: Where all of them are.
        pool: Memory for them.
        count: How many that need not stay may be there at a time, at least 2.

    Attributes:
        by_storage: Where in memory those are that need not stay.
    """

    def __init__(self, store: ShardStore, pool: BufferPool, count: int) -> None:
        assert count >= 2
        self.count = count
        self.by_storage: dict[int, Block] = {}
        self._store, self._pool = store, pool
        self._reading: dict[str, tuple[Tensor, Transfer]] = {}
        self._recent: OrderedDict[str, Block] = OrderedDict()  # those that are not kept
        self._follows: dict[tuple[str, str], str] = {}
        self._last: dict[str, str] = {}

    def begin(self, phase: str) -> None:
        """A phase, such as the forward of a step, begins: what comes first follows nothing.

        Nor does anything follow what was last: in a validation the first block does, batch by
        batch, and would be read where backward is next.
        """
        self._store.traffic.begin(phase)
        self._follows.pop((phase, self._last.pop(phase, "")), None)

    def fetch(self, block: Block, phase: str) -> Tensor:
        """The block's memory with its values, to which its parameters are set.

        Args:
            block: Which one.
            phase: What for; blocks follow each other in a phase as they did the last time.
        """
        if block.memory is None:
            if block.name not in self._reading:
                self._start(block)
            memory, transfer = self._reading.pop(block.name)
            transfer.wait()
            block.show(memory)
        assert block.memory is not None
        if not block.kept:
            self._recent[block.name] = block
            self.by_storage[block.memory.untyped_storage().data_ptr()] = block
            self._recent.move_to_end(block.name)
            self._make_room(0)
        self._foresee(block.name, phase)
        return block.memory

    def release(self, block: Block) -> None:
        """Give a block up, unless it stays."""
        self._recent.pop(block.name, None)
        if not block.kept and block.memory is not None and not block.users:
            del self.by_storage[block.memory.untyped_storage().data_ptr()]
            block.hide()

    def release_all(self) -> None:
        """Give up whatever need not stay."""
        for _, transfer in self._reading.values():
            transfer.wait()
        self._reading.clear()
        for block in list(self._recent.values()):
            self.release(block)

    def _start(self, block: Block) -> None:
        memory = self._pool.take(block.nbytes)
        self._reading[block.name] = memory, self._store.read(block.name, memory)

    def _foresee(self, name: str, phase: str) -> None:
        previous = self._last.get(phase)
        if previous is not None and previous != name:
            self._follows[phase, previous] = name
        self._last[phase] = name
        following = self._store.blocks.get(self._follows.get((phase, name), ""))
        if following is None or following.memory is not None or following.name in self._reading:
            return
        self._make_room(1)
        self._start(following)

    def _make_room(self, more: int) -> None:
        recent = list(self._recent.values())
        for block in recent[:-1]:  # the latest is in use, and so is what it is within
            if len(self._recent) + len(self._reading) + more <= self.count:
                return
            if not block.users and block is not recent[-1].within:
                self.release(block)
