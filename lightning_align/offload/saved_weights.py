"""What autograd keeps of a block's values for backward: a note of which part it was, no memory.

Autograd would hold every weight until backward. In its place stands the block and where in it the
tensor lay (``saved_tensors_hooks``), and backward fetches that block again. No weight is held
twice, nothing depends on the order in which hooks are called, and a version counter has nothing to
object to.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_align.offload.activations import Activations, Moved
from lightning_align.offload.block import Block
from lightning_align.offload.prefetch import Residents


class _Saved(NamedTuple):
    """What autograd saved of a block's memory."""

    block: Block
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class SavedWeights:
    """What autograd saves in the forward of blocks that come and go.

    Args:
        residents: The blocks that are in memory.
        blocks: All blocks.
        activations: Where what is no parameter goes; None leaves it in memory.
    """

    def __init__(
        self, residents: Residents, blocks: Iterable[Block], activations: Activations | None
    ) -> None:
        self._residents = residents
        self._activations = activations
        self._kept = [block for block in blocks if not block.comes_and_goes]

    def notes(self) -> AbstractContextManager[Any]:
        """Around a forward whose backward fetches what it needs of blocks."""
        hooks: AbstractContextManager[Any] = torch.autograd.graph.saved_tensors_hooks(
            self._pack, self._unpack
        )
        return hooks

    def _pack(self, tensor: Tensor) -> Tensor | _Saved | Moved:
        if tensor.layout != torch.strided:
            return tensor
        storage = tensor.untyped_storage().data_ptr()
        block = self._residents.by_storage.get(storage)
        if block is None:
            if self._activations is None or self._is_kept(storage):
                return tensor
            return self._activations.pack(tensor)
        return _Saved(
            block,
            tensor.dtype,
            int(tensor.storage_offset()),
            tuple(tensor.shape),
            tensor.stride(),
        )

    def _unpack(self, saved: Tensor | _Saved | Moved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if isinstance(saved, Moved):
            assert self._activations is not None
            return self._activations.unpack(saved)
        memory = self._residents.fetch(saved.block, "backward")
        empty = torch.empty(0, dtype=saved.dtype, device=memory.device)
        return empty.set_(memory.untyped_storage(), saved.offset, saved.shape, saved.stride)

    def _is_kept(self, storage: int) -> bool:
        """Whether that is where the parameters are that stay in memory."""
        memories = (block.seen for block in self._kept)
        return any(m is not None and m.untyped_storage().data_ptr() == storage for m in memories)
