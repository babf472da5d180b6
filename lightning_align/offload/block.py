"""A block: the parameters that come and go together, and where each lies in its memory.

A parameter of a block is the same object all the time; only its data come and go. While they are
away they are one NaN that is seen in the parameter's shape, which takes no memory; and whoever
reads them is told so (``away``).

Where something else than the host computes, a block that is present has two memories: in the host's
it is read, updated and written, and on the device there is a copy, in which its parameters are.

Where several ranks train one model a block's memory is cut into as many sections, all of one
length, and each rank stores and updates the parameters, or pieces of them, that lie in its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_align.offload.away import come_back, go_away
from lightning_align.offload.places import Piece, Place, cut_anywhere, cut_between, placed


class Block:
    """Parameters that come and go together.

    Args:
        name: Of the block, also of its files.
        parameters: By name; tied ones once.
        kept: Whether it stays in memory from beginning to end.
        read_only: Whether nobody ever trains it: it has one file, and no part in what is saved.

    Attributes:
        kept: Whether its values stay in host memory from beginning to end.
        travels: Whether they do, and come and go on a device that computes all the same.
        is_stored: Whether its values are on a drive; otherwise they are in memory alone.
        gradients_stay: Whether its gradients stay in ``p.grad`` until they are used.
        states_stay: Whether its optimizer state stays in memory, and is nowhere else.
        places: Where each parameter lies in the block's memory.
        nbytes: Length of that memory.
        section: Which part of it this rank stores and updates; without others, all of it.
        pieces: What lies there, by name of parameter.
        memory: The values in host memory, while they are there.
        there: Their copy on another device that computes, while there is one.
        users: Forwards that are running in it now.
        within: The block in whose forward it is called, if any.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        *,
        kept: bool = False,
        read_only: bool = False,
    ) -> None:
        self.name, self.read_only = name, read_only
        self.parameters = dict(parameters)
        self.kept = self.gradients_stay = kept
        self.is_stored, self.states_stay = True, False
        self.travels = False
        self.divide(0, 1)
        self.memory: Tensor | None = None
        self.there: Tensor | None = None
        self._stored: list[int] = []  # versions of the parameters
        self.users = 0
        self.within: Block | None = None
        self._nan = {
            name: torch.full((), torch.nan, dtype=parameter.dtype, device=parameter.device)
            for name, parameter in self.parameters.items()
        }

    def divide(self, rank: int, count: int, *, whole: bool = False, first: int = 0) -> None:
        """Cut the memory into sections; values that are there must be placed anew.

        Args:
            rank: Whose section is this rank's.
            count: Sections.
            whole: Whether no parameter may lie in two of them.
            first: Which section gets the largest parameter then.
        """
        if count == 1:
            self.places, self.nbytes = placed(self.parameters)
        elif whole:
            self.places, self.nbytes = cut_between(self.parameters, count, first)
        else:
            self.places, self.nbytes = cut_anywhere(self.parameters, count)
        length = self.nbytes // count
        self.section = slice(rank * length, (rank + 1) * length)
        everything = {name: Piece(0, place) for name, place in self.places.items()}
        self.pieces = everything if count == 1 else dict(self._pieces())

    def _pieces(self) -> Iterator[tuple[str, Piece]]:
        for name, place in self.places.items():
            begin = max(place.offset, self.section.start)
            end = min(place.offset + place.nbytes, self.section.stop)
            if end - begin == place.nbytes and begin < self.section.stop:
                offset = place.offset - self.section.start
                yield name, Piece(0, Place(offset, place.shape, place.dtype))
            elif begin < end:
                size = place.dtype.itemsize
                part = Place(begin - self.section.start, ((end - begin) // size,), place.dtype)
                yield name, Piece((begin - place.offset) // size, part)

    def stretches(self, within: slice) -> Iterator[tuple[torch.dtype, slice]]:
        """Parts of the memory that are of numbers of one kind.

        Args:
            within: Of which part of it.
        """
        begin, dtype = within.start, None
        for place in sorted(self.places.values(), key=lambda place: place.offset):
            if place.offset >= within.stop or dtype == place.dtype:
                continue
            if dtype is not None and place.offset > begin:
                yield dtype, slice(begin, place.offset)
                begin = place.offset
            dtype = place.dtype
        if dtype is not None:
            yield dtype, slice(begin, within.stop)

    @property
    def comes_and_goes(self) -> bool:
        """Whether parameters are away while others compute."""
        return self.travels or not self.kept

    @property
    def seen(self) -> Tensor | None:
        """The memory in which the parameters are, while they compute."""
        return self.memory if self.there is None else self.there

    @property
    def section_nbytes(self) -> int:
        """Bytes that each rank stores of it."""
        return int(self.section.stop - self.section.start)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that require gradients now."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

    def take_gradients(self) -> dict[str, Tensor]:
        """The gradients in ``p.grad``, which are no longer there."""
        found = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        for parameter in self.parameters.values():
            parameter.grad = None
        return found

    def copy_into(self, memory: Tensor) -> None:
        """Copy the parameters' values, which must be here, into memory of ``nbytes``."""
        memory.zero_()
        for name, place in self.places.items():
            place.of(memory).copy_(self.parameters[name].detach())

    def show(self, memory: Tensor) -> None:
        """Let the parameters have their values there."""
        self.memory = memory
        self._be_in(memory)

    def show_there(self, there: Tensor) -> None:
        """Let the parameters be in the copy of their values on another device."""
        self.there = there
        self._be_in(there)

    def _be_in(self, memory: Tensor) -> None:
        for name, place in self.places.items():
            come_back(self.parameters[name], place.of(memory))
        self.note_stored()

    def note_stored(self) -> None:
        """What is in memory is what is stored."""
        self._stored = [parameter._version for parameter in self.parameters.values()]

    @property
    def is_edited(self) -> bool:
        """Whether somebody has changed values that stay in memory, in place, since then."""
        now = [parameter._version for parameter in self.parameters.values()]
        is_here = self.memory is not None and not self.comes_and_goes
        return is_here and now != self._stored

    def show_section(self, memory: Tensor) -> None:
        """Let the parameters be their pieces, for the optimizer.

        Args:
            memory: This rank's section.
        """
        for name in self.parameters:
            if name in self.pieces:
                come_back(self.parameters[name], self.pieces[name].place.of(memory))
            else:
                self._go_away(name)

    def hide(self) -> None:
        """Take the values away; who holds a view of them keeps it, and the memory with it."""
        self.memory = None
        self.hide_there()

    def hide_there(self) -> None:
        """Take the parameters away from the device; values in host memory stay."""
        self.there = None
        for name in self.parameters:
            self._go_away(name)

    def stand_in_on(self, device: torch.device) -> None:
        """Let parameters be on a device whenever they are away; autograd asks where they are."""
        self._nan = {name: nan.to(device) for name, nan in self._nan.items()}

    def _go_away(self, name: str) -> None:
        stand_in = self._nan[name].expand(self.places[name].shape)
        go_away(self.parameters[name], f"{name} of {self.name}", stand_in)


def check_names(blocks: Iterable[Block]) -> None:
    """Assert that no parameter is in two blocks."""
    seen: set[int] = set()
    for block in blocks:
        ids = set(map(id, block.parameters.values()))
        assert not ids & seen, f"a parameter of {block.name} is in another block, too"
        seen |= ids
