"""Blocks on disk: two files for each, and a record that says which of the two is whole.

An update writes the file that the record does *not* name. Whatever happens in the middle, the
record still names values that nobody has touched since; once all that was written is durable, the
next record names the others. A frozen block is not written at all, and its file stays the same.

In a file are the parameters, then the optimizer's tensors of one parameter after the other.

A file may be *held*: a checkpoint has a link to it, or somebody looks at its bytes. Then it is not
written again: the next update of the block makes a new file, which takes the old one's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import xxhash
from torch import Tensor

from lightning_align.durable import sync_path
from lightning_align.offload.block import Block, check_names
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import DirectFile, Threads, Transfer
from lightning_align.offload.memory_file import MemoryFile
from lightning_align.offload.places import aligned
from lightning_align.offload.ranks import Ranks
from lightning_align.offload.record import FILE, FILES, Record, StatePlace, read_record
from lightning_align.offload.set_aside import set_aside
from lightning_align.offload.striped import MARK, StripedFile, open_file
from lightning_align.offload.tuning import TRIAL

_SUFFIX = ".block"
_FRESH = f".fresh{_SUFFIX}"
_LEFT = ("gradients", "activations", MARK)  # by a run, or by its end
AnyFile = DirectFile | StripedFile | MemoryFile


class ShardStore:
    """Files of a rank's blocks.

    Args:
        folder: Where they are; it is made, unless everything stays in memory.
        blocks: What is stored; a name may be asked for as a name of a file.
        threads: Who reads and writes.
        atomic_step: Whether a block has two files, so that a step counts as a whole or not at all.
        drives: Folders on further drives, over which files are striped.
        ranks: Who trains the model; each stores its section of every block.
        pinned: Whether to register with CUDA what stays in memory.

    Attributes:
        commits: Whether a step can be committed: not if any of it is in memory alone.
        is_on_drive: Whether any of it is not.
        states: Block -> parameter -> where its optimizer state lies in the block's file.
        looked_at: Called before somebody looks at what is stored; finishes what is not yet.
    """

    def __init__(
        self,
        folder: Path,
        blocks: Iterable[Block],
        threads: Threads,
        *,
        atomic_step: bool = True,
        drives: Sequence[Path] = (),
        ranks: Ranks | None = None,
        pinned: bool = False,
    ) -> None:
        self._pinned = pinned
        self.folder, self.folders = folder, [folder, *drives]
        self.blocks = {block.name: block for block in blocks}
        self._numbers = {name: number for number, name in enumerate(self.blocks)}
        check_names(self.blocks.values())
        self.ranks = ranks or Ranks()
        self._divide(whole=False)
        values = self.blocks.values()
        self.commits = all(block.is_stored and not block.states_stay for block in values)
        self.is_on_drive = any(block.is_stored or not block.states_stay for block in values)
        self.atomic_step = atomic_step and self.commits
        self.states: dict[str, dict[str, StatePlace]] = {name: {} for name in self.blocks}
        self._threads, self.traffic = threads, threads.traffic
        self.looked_at: Callable[[], None] = lambda: None
        self._ends = {name: block.section_nbytes for name, block in self.blocks.items()}
        self._room = dict(self._ends)  # what is reserved, at least
        self._current = dict.fromkeys(self.blocks, 0)
        self._committed: dict[str, int] | None = None
        self._commits = 0
        self._unsynced: set[str] = set()
        self._writes: dict[str, list[Transfer]] = {name: [] for name in self.blocks}
        made = self.folders if self.is_on_drive else []
        for place in made:
            place.mkdir(parents=True, exist_ok=True)
        slots = (0, 1) if self.atomic_step else (0,)
        self._files = {
            (name, slot): self._open(block, self._name(name, slot))
            for name, block in self.blocks.items()
            for slot in (slots[:1] if block.read_only else slots)
        }
        self._fresh: dict[str, AnyFile] = {}  # written in the place of one that is held
        for place in made:
            for path in place.glob(f"*{_FRESH}"):  # of a run that was killed
                path.unlink()
            sync_path(place)

    def _divide(self, *, whole: bool) -> None:
        self.whole = whole
        for number, block in enumerate(self.blocks.values()):
            block.divide(self.ranks.rank, self.ranks.size, whole=whole, first=number)

    def _open(self, block: Block, name: str, values: Tensor | None = None) -> AnyFile:
        if block.is_stored:
            return open_file(self.folders, name, self._threads)
        behind = None if block.states_stay else open_file(self.folders, name, self._threads)
        return MemoryFile(block.section_nbytes, behind, values, pinned=self._pinned)

    def _name(self, block: str, slot: int) -> str:
        return f"{self._numbers[block]:05d}.{slot}{_SUFFIX}"

    @property
    def layout(self) -> str:
        """Digest of what the blocks are made of: values of another layout cannot be read."""
        hashed = xxhash.xxh3_128()
        for block in self.blocks.values():
            hashed.update(repr((block.name, block.places)).encode())
        return hashed.hexdigest()

    # Room

    def allocate(self, state_bytes: dict[str, int] | None) -> None:
        """Reserve the files, so that no step finds the disk full.

        Args:
            state_bytes: Block -> bytes of optimizer state to expect; None as long as values are
                only read, which takes one file of each block.

        Raises:
            OSError: If there is no room.
        """
        needed = self._files
        if state_bytes is None:
            needed = {(name, slot): needed[name, slot] for name, slot in self._current.items()}
        for name, block in self.blocks.items():
            states = 0 if block.states_stay else (state_bytes or {}).get(name, 0)
            self._room[name] = max(self._ends[name], block.section_nbytes + aligned(states))
        try:
            for (name, _), file in needed.items():
                if not file.is_held:
                    file.allocate(self._room[name])
        except OSError as error:
            total = sum(self._room[name] for name, _ in needed)
            what = f"all blocks take {total:,} bytes; of a file {error.strerror}"
            raise OSError(error.errno, what, error.filename) from error

    def place_state(self, block: str, parameter: str, nbytes: int) -> StatePlace:
        """Room for a parameter's optimizer state: where it was if it fits, else at the end.

        Args:
            block: Its name.
            parameter: Its name.
            nbytes: What is needed.
        """
        place = self.states[block].get(parameter)
        if place is None or place.capacity < nbytes:
            place = StatePlace(self._ends[block], aligned(nbytes), {})
            self._ends[block] += place.capacity
            self._writable(block).allocate(self._ends[block])
        return place

    def forget_state(self, block: str, parameter: str) -> None:
        """What is stored of a parameter's optimizer state is nothing; its place stays."""
        place = self.states[block].get(parameter)
        if place is not None:
            self.states[block][parameter] = StatePlace(place.offset, place.capacity, {})

    def forget_states(self) -> None:
        """What is stored of an optimizer is of another one."""
        for name, block in self.blocks.items():
            self.states[name] = {}
            self._ends[name] = block.section_nbytes

    # Transfers

    def in_memory(self, block: str) -> Tensor | None:
        """The block's values themselves, if they are in memory; nobody need read or write them."""
        file = self._files[block, self._current[block]]
        if not isinstance(file, MemoryFile) or self.ranks.size > 1:
            return None
        return file.view(0, self.blocks[block].nbytes)

    @property
    def host_nbytes(self) -> int:
        """Bytes of values that lie in host memory alone, or of their sections."""
        current = [self._files[name, slot] for name, slot in self._current.items()]
        in_memory = [file for file in current if isinstance(file, MemoryFile)]
        return sum(file.memory_nbytes for file in in_memory)

    def rearranged(self, block: str) -> None:
        """The block's section is another one: what it has in memory begins anew, of its length."""
        slot = self._current[block]
        if isinstance(file := self._files[block, slot], MemoryFile):
            self.settle(block)
            file.close()
            self._files[block, slot] = self._open(self.blocks[block], self._name(block, slot))

    def read(self, block: str, memory: Tensor, offset: int = 0) -> Transfer:
        """Fill memory from the block's values.

        Args:
            block: Its name.
            memory: Bytes.
            offset: Where in its file; the parameters are at 0.
        """
        self.settle(block)
        return self.read_more(block, memory, offset)

    def read_more(self, block: str, memory: Tensor, offset: int) -> Transfer:
        """The same in the middle of an update, whose writes are of other bytes."""
        return self._files[block, self._current[block]].read(memory, offset)

    def write(self, block: str, memory: Tensor, offset: int = 0) -> None:
        """Write what will be the block's values after ``update_done``.

        Writes of one update are in no order. Before another one, ``settle``.

        Args:
            block: Its name.
            memory: Bytes; they must not change until ``settle``.
            offset: Where in its file.
        """
        self._writes[block].append(self._writable(block).write(memory, offset))

    def settle(self, block: str) -> None:
        """Wait until what was written to a block is in its file."""
        writes, self._writes[block] = self._writes[block], []
        for transfer in writes:
            transfer.wait()

    def settle_all(self) -> None:
        """Wait until all that was written is in its file."""
        for name in self.blocks:
            self.settle(name)

    def moves(self, block: str) -> bool:
        """Whether the next update writes another file than the one that is read."""
        target = self._target(block)
        return target != self._current[block] or self._files[block, target].is_held

    def carry_states(self, block: str, pool: BufferPool) -> None:
        """Take a block's optimizer state along to the file that is being written."""
        if not self.moves(block):
            return
        for place in filter(lambda place: place.tensors, self.states[block].values()):
            memory = pool.take(place.capacity)
            self.read_more(block, memory, place.offset).wait()
            self.write(block, memory, place.offset)

    def update_done(self, block: str) -> None:
        """The block's values are those that were written last."""
        self._current[block] = target = self._target(block)
        if (fresh := self._fresh.pop(block, None)) is not None:
            old, self._files[block, target] = self._files[block, target], fresh
            fresh.rename(self._name(block, target))
            old.close()
        self._unsynced.add(block)

    def _target(self, block: str) -> int:
        if self._committed is None or (block, 1) not in self._files:
            return self._current[block]
        return 1 - self._committed[block]

    def _writable(self, block: str) -> AnyFile:
        """The file that an update writes: a new one, where nobody may write what is there."""
        if block in self._fresh:
            return self._fresh[block]
        file = self._files[block, self._target(block)]
        if not file.is_held:
            return file
        fresh = self._open(
            self.blocks[block], f"{self._numbers[block]:05d}{_FRESH}", self.in_memory(block)
        )
        fresh.allocate(max(self._room[block], self._ends[block]))
        self._fresh[block] = fresh
        return fresh

    def let_go(self, block: str) -> None:
        """Give up the memory of a block that nobody will read again; what is on a drive stays."""
        self.settle(block)
        file = self._files[block, self._current[block]]
        if isinstance(file, MemoryFile):
            file.let_go()

    # What stays as it is, while training goes on

    def values(self, block: str) -> Tensor:
        """This rank's section of the block, as memory that is read when it is looked at.

        Args:
            block: Its name.
        """
        self.looked_at()
        self.settle(block)
        file = self._files[block, self._current[block]]
        return file.shown(0, self.blocks[block].section_nbytes)

    def state_values(self, block: str) -> Tensor:
        """What lies behind the section, in the same way.

        Args:
            block: Its name.
        """
        self.looked_at()
        self.settle(block)
        start = self.blocks[block].section_nbytes
        return self._files[block, self._current[block]].shown(start, self._ends[block] - start)

    def set_aside(self, tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Copies of tensors, each of parts, as the function of that name makes them."""
        return set_aside(tensors, self.folder if self.is_on_drive else None, self._threads)

    def file(self, block: str) -> AnyFile:
        """The file that has the block's values now, once they are written."""
        self.settle(block)
        return self._files[block, self._current[block]]

    @property
    def current(self) -> set[AnyFile]:
        """Files that have the values now."""
        return {self._files[name, slot] for name, slot in self._current.items()}

    def make_durable(self) -> None:
        """Wait until what the files have would outlive a loss of power."""
        self.looked_at()
        self.settle_all()
        syncs = [self._files[name, self._current[name]].sync() for name in self._unsynced]
        for sync in syncs:
            sync.wait()
        self._unsynced.clear()

    # Commits

    def commit(self, step: int, payload: bytes) -> None:
        """Make a step the one that counts.

        Args:
            step: Optimizer steps so far.
            payload: What else belongs to it.
        """
        assert self.commits
        self.looked_at()
        before = self.traffic.phase
        self.traffic.begin("commit")
        record = Record(
            step,
            dict(self._current),
            self.states,
            self.layout,
            payload,
            self.ranks.size,
            self.whole,
            self._commits + 1,
        )
        with self.ranks.together(f"step {step}, what it has written"):
            self.make_durable()
            record.prepare(self.folder)
        # No rank writes anything of the next step until all have come to this one.
        with self.ranks.together(f"step {step}, its commit"):
            record.put_in_place(self.folder, keeps_before=self.ranks.size > 1)
        self._committed = dict(self._current)
        self._commits = record.number
        self.traffic.begin("forward" if before == "forward" else "")  # where updates have waited

    def recover(self) -> Record | None:
        """Go to the committed step; None if there is none.

        Raises:
            ValueError: If the record is damaged, of other blocks, or of longer files.
        """
        record = read_record(self.folder)
        if record is None:
            return None
        if record.ranks != self.ranks.size:
            raise ValueError(
                f"{self.folder / FILE} is of step {record.step} of {record.ranks} rank(s), and this"
                f" run has {self.ranks.size}. Go on with as many, or from a checkpoint, which any"
                " number of ranks can read. Nothing was touched there."
            )
        if record.whole != self.whole:
            self._divide(whole=record.whole)
        if record.layout != self.layout:
            raise ValueError(
                f"{self.folder / FILE} is of step {record.step} of another model, or of one that is"
                " cut into other blocks. Nothing was touched there."
            )
        self._current, self.states = dict(record.slots), record.states
        for name, places in self.states.items():
            ends = [place.offset + place.capacity for place in places.values()]
            self._ends[name] = max([self.blocks[name].section_nbytes, *ends])
        for name, slot in record.slots.items():  # before room is reserved, which would fill it up
            file = self._files[name, slot]
            if not isinstance(file, MemoryFile) and file.nbytes < self._ends[name]:
                raise ValueError(
                    f"{file.path} is damaged: it has {file.nbytes:,} of {self._ends[name]:,} bytes."
                    f" Step {record.step} cannot be read there."
                )
        self._committed = dict(record.slots)
        self._commits = record.number
        return record

    def close(self) -> None:
        """Wait for writes and close the files."""
        self.settle_all()
        for file in (*self._files.values(), *self._fresh.values()):
            file.close()


def sweep(folder: Path) -> None:
    """Delete the files of a store: leftovers, or a state that is to be overwritten."""
    if not folder.is_dir():
        return
    for name in FILES:  # first, so that nothing half deleted is committed
        (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.suffix in (_SUFFIX, TRIAL) or path.name in _LEFT:
            path.unlink()
