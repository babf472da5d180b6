"""Gradients of a window: sums, one block at a time, in a file or in memory.

A gradient leaves ``p.grad`` as soon as its block has gone through backward. What is done to all
gradients between backward and the update, to scale or to clip them, needs no further pass: it is
noted down, and done to each when the update reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.device_blocks import Arrived
from lightning_align.offload.files import Threads, Transfer
from lightning_align.offload.places import Place
from lightning_align.offload.ranks import Ranks
from lightning_align.offload.set_aside import set_aside
from lightning_align.offload.striped import open_file

FILE = "gradients"


class GradientSums:
    """The sums of the open window.

    Args:
        folders: Where the file is, striped over several; None keeps the sums in memory.
        blocks: Whose gradients; those of others stay in ``p.grad``.
        pool: Memory for what is under way.
        threads: Who reads and writes.

    Attributes:
        norms: Parameter -> norm of its sum, without what is still to be done to it.
        edits: What is to be done to each sum, in order, in place.
        stay: Whether gradients are left in ``p.grad``, where a user's code looks for them.
    """

    def __init__(
        self,
        folders: Sequence[Path] | None,
        blocks: list[Block],
        pool: BufferPool,
        threads: Threads,
    ) -> None:
        self._blocks = blocks
        self._file = open_file(folders, FILE, threads) if folders and blocks else None
        self._threads = threads
        self.place()
        self._pool = pool
        self._memory: dict[str, Tensor] = {}  # of blocks, where there is no file
        self._nbytes: dict[str, int] = {}  # of what was put away: a block's, or a section's
        self._writes: dict[str, Transfer] = {}
        self._reading: dict[str, tuple[Tensor, Transfer]] = {}
        self._names: dict[str, set[str]] = {}  # block -> parameters that have a sum
        self._used: set[str] = set()  # blocks that were updated with them
        self.norms: dict[nn.Parameter, Tensor] = {}
        self.edits: list[Callable[[Tensor], object]] = []
        self.stay = False

    @property
    def is_stored(self) -> bool:
        """Whether sums that wait do so in a file."""
        return self._file is not None

    def place(self) -> None:
        """Give the sums of all blocks their places, as long as they are now."""
        self._offsets: dict[str, int] = {}
        self._end = 0
        for block in self._blocks:
            self._offsets[block.name] = self._end
            self._end += block.nbytes
        self._is_reserved = False

    def reserve(self) -> None:
        """Reserve room for the sums of all blocks, once; where none waits none is needed.

        Raises:
            OSError: If there is no room.
        """
        if self._file is not None and not self._is_reserved:
            self._file.allocate(self._end)
            self._is_reserved = True

    def names(self, block: Block) -> set[str]:
        """Parameters of a block that have a sum."""
        return self._names.get(block.name, set())

    def is_used(self, block: Block) -> bool:
        """Whether a block was updated with its sums."""
        return block.name in self._used

    @property
    def are_used(self) -> bool:
        """Whether some blocks were updated, and the step has not come to its end."""
        return bool(self._used)

    def used(self, block: Block) -> None:
        """A block was updated with its sums."""
        self._used.add(block.name)

    def add(
        self,
        block: Block,
        arrived: Arrived | None = None,
        *,
        factor: Tensor | float | None = None,
        store: bool = True,
    ) -> Tensor:
        """Move the gradients of a block into its sums.

        Args:
            block: Which one.
            arrived: Its gradients, from a device; None means those in ``p.grad``.
            factor: What the sums are then multiplied by.
            store: Whether to put the sums away; otherwise the caller uses them at once.

        Returns:
            The block's sums.
        """
        known = self._names.setdefault(block.name, set())
        gradients = block.take_gradients() if arrived is None else dict(arrived.gradients)
        if arrived is not None and not known:  # they are their own first sums
            memory = arrived.memory
            known.update(gradients)
            gradients.clear()
        else:
            memory = self._read(block) if known else self._pool.take(block.nbytes)
        for name in list(gradients):
            place, gradient = block.places[name].of(memory), gradients.pop(name)  # and let go
            if name in known:
                place.add_(gradient)
            else:
                place.copy_(gradient)
                known.add(name)
        parts = {name: block.places[name] for name in known}
        self._finish(block, parts, memory, factor=factor, store=store)
        return memory

    def to_reduce(self, block: Block, arrived: Arrived | None = None) -> tuple[Tensor, Tensor]:
        """The window's sums of a block on this rank, with zeros where there is none.

        Args:
            block: Which one.
            arrived: As in ``add``.

        Returns:
            They, and for each parameter whether it has one.
        """
        memory = self.add(block, arrived, store=False)
        known = self.names(block)
        for name in block.parameters.keys() - known:
            block.places[name].of(memory).zero_()
        return memory, torch.tensor([int(name in known) for name in block.parameters])

    def reduced(
        self,
        block: Block,
        section: Tensor,
        present: Tensor,
        *,
        factor: Tensor | float | None = None,
        store: bool = True,
    ) -> None:
        """Take up what has become of the sums of all ranks.

        Args:
            block: Which one.
            section: This rank's.
            present: For each parameter whether it has a gradient on any rank.
            factor: What is then multiplied.
            store: Whether to put the section away; otherwise the caller uses it at once.
        """
        known = {name for name, there in zip(block.parameters, present, strict=True) if there}
        self._names[block.name] = known
        if store and self._file is None:
            section = section.clone()  # and not the memory of all sections
        parts = {name: piece.place for name, piece in block.pieces.items() if name in known}
        self._finish(block, parts, section, factor=factor, store=store)

    def _finish(
        self,
        block: Block,
        parts: dict[str, Place],
        memory: Tensor,
        *,
        factor: Tensor | float | None,
        store: bool,
    ) -> None:
        for name, place in parts.items():
            gradient = place.of(memory)
            if factor is not None:
                gradient.mul_(factor)
            self.norms[block.parameters[name]] = torch.linalg.vector_norm(gradient)
        if store:
            self.put(block, memory)

    def share_norms(self, blocks: Iterable[Block], ranks: Ranks) -> None:
        """Let each rank know the norms of all parameters, of which each has those of its pieces.

        A norm that one rank has is sent as it is, so that it stays the same to the bit.
        """
        named = [(block, n, p) for block in blocks for n, p in block.parameters.items()]
        norms, squares = torch.zeros(2, len(named), dtype=torch.float64)
        for number, (block, name, parameter) in enumerate(named):
            piece = block.pieces.get(name)
            if piece is not None and parameter in self.norms:
                is_whole = piece.place.nbytes == block.places[name].nbytes
                norm = self.norms[parameter].double()
                (norms if is_whole else squares)[number] = norm if is_whole else norm**2
        shared = ranks.sum("the norms", torch.stack([norms, squares]))
        for (block, name, parameter), norm, square in zip(named, *shared, strict=True):
            if name in self.names(block):
                norm = square.sqrt() if square else norm
                self.norms[parameter] = norm.to(parameter.dtype)

    def use(self, block: Block, *, factor: Tensor | float | None = None) -> None:
        """The gradients of a block in ``p.grad`` are about to be used.

        Args:
            block: Which one.
            factor: What they are multiplied by.
        """
        for parameter in block.parameters.values():
            if parameter.grad is not None:
                if factor is not None:
                    parameter.grad.mul_(factor)
                self.norms[parameter] = torch.linalg.vector_norm(parameter.grad).cpu()
        self.used(block)

    def take(self, block: Block) -> Tensor:
        """The block's sums, for the update; they are put away no more."""
        return self._read(block)

    def shown(self) -> dict[str, Tensor]:
        """The sums as they are now, by name of parameter, also when they change.

        Those in memory are copied; those in a file are written to another one, which has no name
        and shows them.
        """
        folder = None if self._file is None else self._file.path.parent
        copies: dict[str, Tensor] = {}
        for block in filter(self.names, self._blocks):
            memory = self._read(block)
            places = {n: place for n, place in block.places.items() if n in self.names(block)}
            sums = [[place.of(memory)] for place in places.values()]
            copies.update(zip(places, set_aside(sums, folder, self._threads), strict=True))
        return copies

    def take_back(self, block: Block, gradients: Mapping[str, Tensor]) -> set[str]:
        """Let gradients be the sums of a block, which has none.

        Args:
            block: Which one.
            gradients: By name of parameter, of other blocks, too.

        Returns:
            Names of those that are of the block.
        """
        names = block.parameters.keys() & gradients.keys()
        memory = self._pool.take(block.nbytes)
        for name in names:
            block.places[name].of(memory).copy_(gradients[name])
        if names:
            views = {name: block.places[name].of(memory) for name in names}
            self.add(block, Arrived(memory, views, []))
        return names

    def put(self, block: Block, memory: Tensor) -> None:
        """Put sums away."""
        self._nbytes[block.name] = len(memory)
        if self._file is None:
            self._memory[block.name] = memory
        else:
            self.reserve()
            offset = self._offsets[block.name]
            self._writes[block.name] = self._file.write(memory, offset)

    def norms_of(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """Norms of the gradients that are there, parameter by parameter; also of ``p.grad``."""
        return [
            self.norms[p] if p in self.norms else torch.linalg.vector_norm(p.grad).cpu()
            for p in parameters
            if p in self.norms or p.grad is not None
        ]

    def edit(self, gradient: Tensor) -> Tensor:
        """Do to a sum, in place, what was noted down."""
        for edit in self.edits:
            edit(gradient)
        return gradient

    def settle_all(self) -> None:
        """Wait until all sums that were put away are in the file."""
        for name in list(self._writes):
            self._settle(name)

    def clear(self) -> None:
        """The window is over."""
        self.settle_all()
        for _, transfer in self._reading.values():
            transfer.wait()
        self._reading.clear()
        self._memory.clear()
        self._names.clear()
        self._used.clear()
        self.norms.clear()
        self.edits.clear()

    def close(self) -> None:
        """Close the file; the sums are lost."""
        self.clear()
        if self._file is not None:
            self._file.close()

    def foresee(self, block: Block) -> None:
        """Begin to read a block's sums."""
        if self._file is not None and block.name not in self._reading:
            self._settle(block.name)
            memory = self._pool.take(self._nbytes[block.name])
            transfer = self._file.read(memory, self._offsets[block.name])
            self._reading[block.name] = memory, transfer

    def _read(self, block: Block) -> Tensor:
        if self._file is None:
            return self._memory[block.name]
        self.foresee(block)
        memory, transfer = self._reading.pop(block.name)
        transfer.wait()
        return memory

    def _settle(self, name: str) -> None:
        if name in self._writes:
            self._writes.pop(name).wait()
