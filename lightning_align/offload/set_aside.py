"""Copies of tensors that take no memory: in a file without a name, which shows them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_align.mapped import part_of
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import DirectFile, Threads
from lightning_align.offload.places import Place, aligned

_PIECE = 4 << 20  # bytes that are copied to be written


def set_aside(
    tensors: Sequence[Sequence[Tensor]], folder: Path | None, threads: Threads
) -> list[Tensor]:
    """Copy tensors, a piece at a time.

    Args:
        tensors: Each as what it is made of, the rows of one part behind those of the other.
        folder: Where the file is; nothing is left of it when they are gone. None: in memory.
        threads: Who writes.
    """
    if folder is None:
        return in_memory(tensors)
    descriptor, path = tempfile.mkstemp(dir=folder, prefix="aside-")
    os.close(descriptor)
    file = DirectFile(Path(path), threads)
    file.path.unlink()
    try:
        places, end = [], 0
        for parts in tensors:
            first, rows = parts[0], sum(len(part) for part in parts if part.ndim)
            shape = (rows, *first.shape[1:]) if first.ndim else ()
            places.append(Place(end, shape, first.dtype))
            end = _append(file, end, parts)
        whole = file.shown(0, end)
    finally:
        file.close()
    return [part_of(whole, where.offset, where.shape, where.dtype) for where in places]


def in_memory(tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The same copies in memory."""
    return [torch.cat(list(parts)) if len(parts) > 1 else parts[0].clone() for parts in tensors]


def _append(file: DirectFile, offset: int, parts: Sequence[Tensor]) -> int:
    """Write parts one behind the other, and say where the next tensor may begin."""
    memory = BufferPool().take(min(_PIECE, aligned(sum(part.nbytes for part in parts))))
    filled = 0
    for part in parts:
        rest = part.detach().contiguous().view(-1).view(torch.uint8)
        while len(rest):
            count = min(len(memory) - filled, len(rest))
            memory[filled : filled + count] = rest[:count]
            filled, rest = filled + count, rest[count:]
            if filled == len(memory):
                file.write(memory, offset).wait()
                offset, filled = offset + filled, 0
    if filled:
        file.write(memory[: aligned(filled)], offset).wait()
    return offset + aligned(filled)
