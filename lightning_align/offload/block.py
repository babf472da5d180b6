"""A block: the parameters that come and go together, and where each lies in its memory.

A parameter of a block is the same object all the time; only its data come and go. While they are
away they are one NaN that is seen in the parameter's shape, which takes no memory; and whoever
reads them is told so (``away``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_align.offload.away import come_back, go_away
from lightning_align.offload.files import ALIGNMENT

PADDING = 64  # elements: vector kernels treat the rest of a tensor that is no multiple otherwise


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a stretch of bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without padding."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        """The tensor.

        Args:
            memory: The bytes it lies in.
        """
        part = memory[self.offset : self.offset + self.nbytes]
        return part.view(self.dtype).view(self.shape)


def placed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Place], int]:
    """Places for tensors one after the other, and the bytes that all of them take.

    Args:
        tensors: By name; only shape and dtype are looked at.
    """
    places, offset = {}, 0
    for name, tensor in tensors.items():
        places[name] = Place(offset, tuple(tensor.shape), tensor.dtype)
        padded = -(-tensor.numel() // PADDING) * PADDING
        offset += padded * tensor.dtype.itemsize
    return places, aligned(offset)


def aligned(nbytes: int) -> int:
    """The next multiple of what direct transfers ask for."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Block:
    """Parameters that come and go together.

    Args:
        name: Of the block, also of its files.
        parameters: By name; tied ones once.
        kept: Whether it stays in memory from beginning to end.

    Attributes:
        kept: Whether its values stay in memory from beginning to end.
        is_stored: Whether its values are on a drive; otherwise they are in memory alone.
        gradients_stay: Whether its gradients stay in ``p.grad`` until they are used.
        states_stay: Whether its optimizer state stays in memory, and is nowhere else.
        places: Where each parameter lies in the block's memory.
        nbytes: Length of that memory.
        memory: The values, while they are here.
        users: Forwards that are running in it now.
        within: The block in whose forward it is called, if any.
    """

    def __init__(
        self, name: str, parameters: Mapping[str, nn.Parameter], *, kept: bool = False
    ) -> None:
        self.name = name
        self.parameters = dict(parameters)
        self.kept = self.gradients_stay = kept
        self.is_stored, self.states_stay = True, False
        self.places, self.nbytes = placed(self.parameters)
        self.memory: Tensor | None = None
        self.users = 0
        self.within: Block | None = None
        self._nan = {
            name: torch.full((), torch.nan, dtype=parameter.dtype, device=parameter.device)
            for name, parameter in self.parameters.items()
        }

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that require gradients now."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

    def copy_into(self, memory: Tensor) -> None:
        """Copy the parameters' values, which must be here, into memory of ``nbytes``."""
        memory.zero_()
        for name, place in self.places.items():
            place.of(memory).copy_(self.parameters[name].detach())

    def show(self, memory: Tensor) -> None:
        """Let the parameters have their values there."""
        self.memory = memory
        for name, place in self.places.items():
            come_back(self.parameters[name], place.of(memory))

    def hide(self) -> None:
        """Take the values away; who holds a view of them keeps it, and the memory with it."""
        self.memory = None
        for name, parameter in self.parameters.items():
            stand_in = self._nan[name].expand(self.places[name].shape)
            go_away(parameter, f"{name} of {self.name}", stand_in)


def check_names(blocks: Iterable[Block]) -> None:
    """Assert that no parameter is in two blocks."""
    seen: set[int] = set()
    for block in blocks:
        ids = set(map(id, block.parameters.values()))
        assert not ids & seen, f"a parameter of {block.name} is in another block, too"
        seen |= ids
