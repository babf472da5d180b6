"""Where tensors lie in a stretch of memory, one behind the other or in sections of equal length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_align.offload.files import ALIGNMENT

PADDING = 64  # elements: vector kernels treat the rest of a tensor that is no multiple otherwise
_WIDEST = 8  # bytes of the widest element


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


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that a rank stores and updates: all of it, or a stretch.

    Attributes:
        start: First element of the parameter that is part of it.
        place: Where it lies in the rank's section.
    """

    start: int
    place: Place

    def of_whole(self, tensor: Tensor) -> Tensor:
        """The same part of another tensor of the parameter's shape."""
        numel = torch.Size(self.place.shape).numel()
        return tensor.reshape(-1)[self.start : self.start + numel].view(self.place.shape)


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


def aligned(nbytes: int, unit: int = ALIGNMENT) -> int:
    """The next multiple of a unit, by default of what direct transfers ask for."""
    return -(-nbytes // unit) * unit


def cut_anywhere(tensors: Mapping[str, Tensor], count: int) -> tuple[dict[str, Place], int]:
    """Places one after the other, wherever sections begin, and the bytes of all sections.

    A section begins at a multiple of ``PADDING`` elements of whatever parameter lies there.

    Args:
        tensors: By name.
        count: Sections.
    """
    places, offset = {}, 0
    for name, tensor in tensors.items():
        places[name] = Place(offset, tuple(tensor.shape), tensor.dtype)
        offset += aligned(places[name].nbytes, PADDING * _WIDEST)
    return places, aligned(offset, ALIGNMENT * count)


def cut_between(
    tensors: Mapping[str, Tensor], count: int, first: int = 0
) -> tuple[dict[str, Place], int]:
    """Places that lie in one section each, the largest tensor first where least is, and all bytes.

    Args:
        tensors: By name.
        count: Sections.
        first: Which section is filled first, so that it need not be the same in all blocks.
    """
    sizes = {
        n: aligned(t.numel() * t.element_size(), PADDING * _WIDEST) for n, t in tensors.items()
    }
    order = [(first + number) % count for number in range(count)]
    filled = dict.fromkeys(order, 0)
    found = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        section = min(order, key=filled.__getitem__)
        found[name] = section, filled[section]
        filled[section] += sizes[name]
    length = aligned(max(filled.values()))
    places = {
        name: Place(found[name][0] * length + found[name][1], tuple(tensor.shape), tensor.dtype)
        for name, tensor in tensors.items()
    }
    return places, length * count
