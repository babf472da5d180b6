"""Gradients of a window: sums, one block at a time, in a file or in memory.

A gradient leaves ``p.grad`` as soon as its block has gone through backward. What is done to all
gradients between backward and the update, to scale or to clip them, needs no further pass: it is
noted down, and done to each when the update reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import Threads, Transfer
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
        self._offsets: dict[str, int] = {}
        offset = 0
        for block in blocks:
            self._offsets[block.name] = offset
            offset += block.nbytes
        self._file = open_file(folders, FILE, threads) if folders and blocks else None
        if self._file is not None:
            self._file.allocate(offset)
        self._pool = pool
        self._memory: dict[str, Tensor] = {}  # of blocks, where there is no file
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

    def names(self, block: Block) -> set[str]:
        """Parameters of a block that have a sum."""
        return self._names.get(block.name, set())

    def is_used(self, block: Block) -> bool:
        """Whether a block was updated with its sums."""
        return block.name in self._used

    def used(self, block: Block) -> None:
        """A block was updated with its sums."""
        self._used.add(block.name)

    def add(
        self, block: Block, *, factor: Tensor | float | None = None, store: bool = True
    ) -> Tensor:
        """Move the gradients of a block into its sums.

        Args:
            block: Which one.
            factor: What the sums are then multiplied by.
            store: Whether to put the sums away; otherwise the caller uses them at once.

        Returns:
            The block's sums.
        """
        known = self._names.setdefault(block.name, set())
        memory = self._read(block) if known else self._pool.take(block.nbytes)
        for name, parameter in block.parameters.items():
            if parameter.grad is None:
                continue
            place = block.places[name].of(memory)
            if name in known:
                place.add_(parameter.grad)
            else:
                place.copy_(parameter.grad)
                known.add(name)
            parameter.grad = None
        for name in known:
            place = block.places[name].of(memory)
            if factor is not None:
                place.mul_(factor)
            self.norms[block.parameters[name]] = torch.linalg.vector_norm(place)
        if store:
            self.put(block, memory)
        return memory

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
                self.norms[parameter] = torch.linalg.vector_norm(parameter.grad)
        self.used(block)

    def take(self, block: Block) -> Tensor:
        """The block's sums, for the update; they are put away no more."""
        return self._read(block)

    def put(self, block: Block, memory: Tensor) -> None:
        """Put sums away."""
        if self._file is None:
            self._memory[block.name] = memory
        else:
            offset = self._offsets[block.name]
            self._writes[block.name] = self._file.write(memory, offset)

    def norms_of(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """Norms of the gradients that are there, parameter by parameter; also of ``p.grad``."""
        return [
            self.norms[p] if p in self.norms else torch.linalg.vector_norm(p.grad)
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
            memory = self._pool.take(block.nbytes)
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
