"""Values of whole blocks: stored at the beginning, gathered in between, copied at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_align._compat.glibc_memory import give_back_freed
from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.prefetch import Residents
from lightning_align.offload.store import ShardStore


class WholeValues:
    """The values of all parameters, a block at a time.

    Args:
        store: Files of all blocks.
        residents: What is in memory.
        pool: Memory for them.
    """

    def __init__(self, store: ShardStore, residents: Residents, pool: BufferPool) -> None:
        self._store, self._residents, self._pool = store, residents, pool
        self._blocks = list(store.blocks.values())

    @torch.no_grad()
    def store_values(self, taken: Callable[[Block], None] = lambda _: None) -> None:
        """Write the values that the parameters have, block by block, and let them go.

        Args:
            taken: Called with each block when its values have been read.
        """
        for number, block in enumerate(self._blocks):
            if number > 1:  # no read waits behind these writes, so they would pile up in memory
                self._store.settle(self._blocks[number - 2].name)
            memory = self._store.in_memory(block.name)
            if memory is None:
                memory = self._pool.take(block.nbytes)
            block.copy_into(memory)
            taken(block)
            self._store.write(block.name, memory)
            self._store.update_done(block.name)
            if block.kept:
                block.show(memory)
            else:
                block.hide()
            give_back_freed()  # a model in memory is given back while it moves

    def read_values(self) -> None:
        """Let go the values that the parameters have, and take the stored ones."""
        for block in self._blocks:
            block.hide()
            if block.kept:
                self._residents.fetch(block, "begin")
        give_back_freed()

    @contextmanager
    def gathered(
        self,
        parameters: Iterable[str | nn.Parameter] | None = None,
        *,
        modify: bool = False,
    ) -> Iterator[None]:
        """All parameters, or some, in memory for a while.

        Args:
            parameters: They or their names; their whole blocks are fetched.
            modify: Whether their values are stored at the end.
        """
        wanted = None if parameters is None else set(parameters)
        blocks = [
            block
            for block in self._blocks
            if wanted is None
            or wanted & block.parameters.keys()
            or wanted.intersection(block.parameters.values())
        ]
        for block in blocks:
            block.users += 1
            self._residents.fetch(block, "gathered")
        try:
            yield
        finally:
            for block in blocks:
                block.users -= 1
                if modify:
                    self._rewrite(block)
                self._residents.release(block)

    def _rewrite(self, block: Block) -> None:
        assert block.memory is not None
        self._store.settle(block.name)
        self._store.carry_states(block.name, self._pool)
        self._store.write(block.name, block.memory)
        self._store.update_done(block.name)

    @torch.no_grad()
    def values(self) -> dict[nn.Parameter, Tensor]:
        """Copies of all parameters."""
        copies = {}
        for block in self._blocks:
            memory = self._residents.fetch(block, "values")
            for name, parameter in block.parameters.items():
                copies[parameter] = block.places[name].of(memory).clone()
        return copies
