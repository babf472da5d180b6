"""Which blocks are in memory: read before they are needed, given up when others are.

The order of a step is the order of the step before, so what comes next is known and read while the
present block computes. Given up is what was used longest ago; that is safe at any moment, because
whoever needs the values again fetches them, and whoever still looks at them keeps their memory.

Of several ranks each reads its own section, and gathers those of the others behind it; for an
update its own section is enough.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.device_blocks import DeviceBlocks
from lightning_align.offload.files import Transfer
from lightning_align.offload.host_blocks import HostBlocks
from lightning_align.offload.store import ShardStore


class Residents:
    """The blocks that are in memory now.

    Args:
        store: Where all of them are.
        pool: Memory for them.
        count: How many that need not stay may be there at a time, at least 2.

    Attributes:
        by_storage: Where in memory those are that need not stay, and compute.
        host: Host memory as the place where blocks compute.
        place: Where they do; at first that.
        fetched: Called with a block whose values are here, and the phase, before they are used.
    """

    def __init__(self, store: ShardStore, pool: BufferPool, count: int) -> None:
        assert count >= 2
        self.count = count
        self.by_storage: dict[int, Block] = {}
        self.host = HostBlocks()
        self.place: HostBlocks | DeviceBlocks = self.host
        self._store, self._pool = store, pool
        self._reading: dict[str, tuple[Tensor, Transfer]] = {}
        self._own: dict[str, tuple[Tensor, Transfer]] = {}  # sections, for updates to come
        self._recent: OrderedDict[str, Block] = OrderedDict()  # those that are not kept
        self._follows: dict[tuple[str, str], str] = {}
        self._last: dict[str, str] = {}
        self.fetched: Callable[[Block, str], None] = lambda *_: None

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
        self.values(block, phase)
        memory = self.place.bring(block)
        if block.comes_and_goes:
            self.by_storage[memory.untyped_storage().data_ptr()] = block
        return memory

    def values(self, block: Block, phase: str) -> Tensor:
        """The block's values in host memory, for whoever does not compute with them.

        Args:
            block: Which one.
            phase: As in ``fetch``.
        """
        self._read(block)
        if block.comes_and_goes:
            self._recent[block.name] = block
            self._recent.move_to_end(block.name)
            self._make_room(0)
        self.fetched(block, phase)  # first, as it may have to read what is needed now
        self._foresee(block.name, phase)
        return self._current(block)

    def _current(self, block: Block) -> Tensor:
        if block.is_edited:
            return self.edited(block)
        assert block.memory is not None
        return block.memory

    def edited(self, block: Block) -> Tensor:
        """The block's values in host memory, as somebody has edited them where they compute."""
        self._store.settle(block.name)
        self.place.take_back(block)
        assert block.memory is not None
        return block.memory

    def _read(self, block: Block) -> None:
        if block.memory is None:
            if block.name not in self._reading:
                self._start(block)
            memory, transfer = self._reading.pop(block.name)
            transfer.wait()
            self.put(block, memory)

    def put(self, block: Block, memory: Tensor) -> None:
        """Let a block have its values in host memory there; they compute when they are fetched."""
        block.memory = memory
        self.place.admit(block)

    def foresee_section(self, block: Block) -> None:
        """Begin to read the section of a block that this rank will update."""
        is_here = self._store.ranks.size == 1 or block.memory is not None
        if not is_here and block.name not in self._own:
            memory = self._pool.take(block.section_nbytes)
            self._own[block.name] = memory, self._store.read(block.name, memory)

    def keep_section(self, block: Block) -> None:
        """Keep a copy of a block's section, if it is here: an update to come will need it."""
        if block.memory is not None and not block.kept:
            memory = self._pool.take(block.section_nbytes)
            memory.copy_(block.memory[block.section])
            self._own[block.name] = memory, Transfer()

    def take_section(self, block: Block, phase: str) -> Tensor:
        """This rank's section of a block, to be updated; parameters are their pieces there.

        Args:
            block: Which one.
            phase: What for.
        """
        alone = self._store.ranks.size == 1
        self.foresee_section(block)
        if block.name in self._own:
            memory, transfer = self._own.pop(block.name)
            transfer.wait()
        else:
            # Where a device computes, the block after it has been fetched: its turn is over.
            is_past = self.place.lag and block.memory is not None
            values = self.values(block, phase) if alone and not is_past else self._current(block)
            memory = values[block.section]
        self.place.settle(block)
        block.show_section(memory)
        return memory

    def section_updated(self, block: Block) -> None:
        """Behind an update of a section: others have updated theirs, too."""
        alone = self._store.ranks.size == 1
        if not alone and not block.kept:
            self.discard(block)
            return
        assert block.memory is not None
        if not alone:
            self._gather(block, block.memory).wait()
        self._compute_no_more(block)
        self.place.updated(block)

    def discard(self, block: Block) -> None:
        """Give up a block whose values are no longer those that are stored."""
        if block.name in self._reading:
            self._reading.pop(block.name)[1].wait()
        self._recent.pop(block.name, None)
        self._compute_no_more(block)
        self.place.leave(block)
        block.hide()

    def release(self, block: Block) -> None:
        """Give a block up, unless it stays."""
        self._recent.pop(block.name, None)
        if block.users or not block.comes_and_goes:
            return
        self._compute_no_more(block)
        self.place.leave(block)
        if not block.kept:
            block.hide()

    def let_go(self, block: Block) -> None:
        """Give up a block that nobody will fetch again, also if it was to stay."""
        self.discard(block)
        block.kept = block.travels = False

    def _compute_no_more(self, block: Block) -> None:
        if block.seen is not None:
            self.by_storage.pop(block.seen.untyped_storage().data_ptr(), None)

    def release_all(self) -> None:
        """Give up whatever need not stay."""
        for begun in (self._reading, self._own):
            for _, transfer in begun.values():
                transfer.wait()
            begun.clear()
        for block in list(self._recent.values()):
            self.release(block)

    def compute_in(self, place: HostBlocks | DeviceBlocks) -> None:
        """Let blocks compute somewhere else from now on."""
        if place is self.place:
            return
        self.release_all()
        for block in self._store.blocks.values():
            if block.is_edited:
                self.edited(block)
            block.stand_in_on(place.device)
            self.place.leave(block)
        self.place.settle_all()
        self.place = place
        for block in self._store.blocks.values():
            place.admit(block)

    @contextmanager
    def in_host_memory(self) -> Iterator[None]:
        """Around what asks parameters where they are, to put something else there."""
        place = self.place
        self.compute_in(self.host)
        try:
            yield
        finally:
            self.compute_in(place)

    def _start(self, block: Block) -> None:
        memory = self._pool.take(block.nbytes)
        transfer = self._store.read(block.name, memory[block.section])
        if self._store.ranks.size > 1:
            transfer = self._gather(block, memory, transfer)
        self._reading[block.name] = memory, transfer

    def _gather(self, block: Block, memory: Tensor, own: Transfer | None = None) -> Transfer:
        gathered = self._store.ranks.gather(block.name, memory, own)
        return Transfer([gathered], self._store.traffic)

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
