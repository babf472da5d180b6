"""Values of whole blocks: stored at the beginning, gathered in between, copied at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_align._compat.glibc_memory import give_back_freed
from lightning_align.mapped import part_of
from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.linked import Stretch, outline
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
        self._trained = [block for block in self._blocks if not block.read_only]

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
            self._store.ranks.of_one(f"the first values of {block.name}", memory)
            self._store.write(block.name, memory[block.section])
            self._store.update_done(block.name)
            if block.kept:
                block.show(memory)
            else:
                block.hide()
            # A model in memory is given back while it moves.
            give_back_freed(from_now_on=self._store.is_on_drive)

    @torch.no_grad()
    def arrange(self, *, whole: bool) -> None:
        """Store the values in other sections; what is stored of an optimizer is forgotten.

        Args:
            whole: Whether no parameter may lie in two of them.
        """
        ranks = self._store.ranks
        for number, block in enumerate(self._blocks):
            old, places = self._residents.values(block, "values"), block.places
            self._residents.discard(block)
            block.divide(ranks.rank, ranks.size, whole=whole, first=number)
            self._store.rearranged(block.name)
            memory = self._pool.take(block.nbytes)
            for name, place in block.places.items():
                place.of(memory).copy_(places[name].of(old))
            if block.kept:
                self._residents.put(block, memory)
            self._store.settle(block.name)
            self._store.write(block.name, memory[block.section])
            self._store.update_done(block.name)
        self._store.whole = whole
        self._store.forget_states()

    def read_values(self) -> None:
        """Let go the values that the parameters have, and take the stored ones."""
        for block in self._blocks:
            block.hide()
            if block.kept:
                self._residents.fetch(block, "begin")
        give_back_freed(from_now_on=self._store.is_on_drive)

    @contextmanager
    def gathered(
        self,
        parameters: Iterable[str | nn.Parameter] | None = None,
        *,
        modify: bool = False,
    ) -> Iterator[None]:
        """All parameters, or some, in memory for a while.

        Args:
            parameters: They or their names; their whole blocks are fetched. None means all but
                those that are only read.
            modify: Whether their values are stored at the end.
        """
        wanted = None if parameters is None else set(parameters)
        blocks = [
            block
            for block in (self._trained if wanted is None else self._blocks)
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

    @contextmanager
    def put(self) -> Iterator[None]:
        """Around code that copies values into parameters, such as ``load_state_dict``.

        What is copied into a parameter goes to its block, one block after the other.
        """
        owners = {p: block for block in self._blocks for p in block.parameters.values()}
        with _CopiesToBlocks(self, owners):
            yield

    def _rewrite(self, block: Block) -> None:
        self._store.settle(block.name)
        memory = self._residents.edited(block)
        self._store.carry_states(block.name, self._pool)
        self._store.write(block.name, memory[block.section])
        self._store.update_done(block.name)
        block.note_stored()
        if block.kept and self._store.ranks.size > 1:  # what was edited may differ elsewhere
            self._store.ranks.gather(block.name, memory).result()
            self._residents.place.updated(block)

    def store_edits(self) -> None:
        """Write what was changed, in place, of values that stay in memory; collective."""
        for block in self._blocks:
            if block.is_edited and block.is_stored:
                self._rewrite(block)
            elif block.is_edited:
                self._residents.edited(block)

    def values(self) -> dict[nn.Parameter, Tensor]:
        """All parameters as they are in memory, or as files show them; what is shown stays.

        Of several ranks the first has copies that are set aside, and others have nothing;
        collective.
        """
        if self._store.ranks.size == 1:
            return self.own()
        self.store_edits()
        return self._gathered()

    def own(self) -> dict[nn.Parameter, Tensor]:
        """What this rank stores of parameters, in the same way; a piece has one dimension."""
        self.store_edits()
        shown = {}
        for block in self._trained:
            section = self._store.values(block.name)
            for name, piece in block.pieces.items():
                place = piece.place
                found = part_of(section, place.offset, place.shape, place.dtype)
                shown[block.parameters[name]] = found
        return shown

    def outlines(self) -> dict[nn.Parameter, Tensor]:
        """For each parameter what this rank has of it, as ``linked`` links it."""
        self._store.looked_at()
        self.store_edits()
        found = {}
        for block in self._blocks:
            file = self._store.file(block.name)
            for name, parameter in block.parameters.items():
                stretches = []
                if (piece := block.pieces.get(name)) is not None:
                    length = torch.Size(piece.place.shape).numel()
                    stretches = [Stretch(file, piece.place.offset, piece.start, length)]
                place = block.places[name]
                found[parameter] = outline(place.shape, place.dtype, stretches)
        return found

    @torch.no_grad()
    def _gathered(self) -> dict[nn.Parameter, Tensor]:
        copies: dict[nn.Parameter, Tensor] = {}
        for block in self._trained:
            memory = self._residents.values(block, "values")
            if self._store.ranks.rank == 0:
                values = [[block.places[name].of(memory)] for name in block.parameters]
                copied = self._store.set_aside(values)
                copies.update(zip(block.parameters.values(), copied, strict=True))
        return copies


class _CopiesToBlocks(TorchFunctionMode):
    """Lets ``parameter.copy_(values)`` find the parameter's block in memory."""

    def __init__(self, whole: WholeValues, owners: dict[nn.Parameter, Block]) -> None:
        super().__init__()
        self._whole, self._owners = whole, owners
        self._block: Block | None = None  # the one that is in memory
        self._gathered = ExitStack()

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        block = self._owners.get(args[0]) if func is Tensor.copy_ else None
        if block is not None and block is not self._block:
            self._gathered.close()
            names = list(block.parameters)
            self._gathered.enter_context(self._whole.gathered(names, modify=True))
            self._block = block
        return func(*args, **(kwargs or {}))

    @override
    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._gathered.close()
