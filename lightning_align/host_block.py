"""Host memory for copies and transfers: allocated once, registered with CUDA, not inherited."""

import mmap
import os
import weakref
from typing import Any, cast

import torch

_cudart: Any = torch.cuda.cudart  # torch leaves these without types
_Storage: Any = torch.UntypedStorage

_MEMORIES: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # of all blocks
_INHERITED: list[mmap.mmap] = []  # of the process that forked this one


class HostBlock:
    """Host memory that child processes do not inherit, registered with CUDA where that is used.

    A forked worker would otherwise make every page copy-on-write, and the next save as slow as
    the first.

    Args:
        nbytes: Bytes that it must hold; a page is the least.
        pinned: Whether to register the block, so that copies from the device need not wait.
    """

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self.nbytes = max(nbytes, mmap.PAGESIZE)
        private = {}
        if hasattr(mmap, "MAP_PRIVATE"):
            private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
        self.memory = mmap.mmap(-1, self.nbytes, **private)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            if hasattr(mmap, advice):
                self.memory.madvise(getattr(mmap, advice))
        _MEMORIES.add(self.memory)
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.pinned = pinned
        if pinned:
            cudart = _cudart()
            address = self.bytes.data_ptr()
            torch.cuda.check_error(int(cudart.cudaHostRegister(address, self.nbytes, 0)))
            # Holds the memory, so that it is unregistered before it is given back.
            weakref.finalize(self, _unregister, os.getpid(), address, self.memory)

    def record(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        """Part of the block as a storage of its own."""
        if not nbytes:
            return cast(torch.UntypedStorage, _Storage(0))
        part = memoryview(self.memory)[offset : offset + nbytes]
        return torch.frombuffer(part, dtype=torch.uint8).untyped_storage()


def _unregister(owner: int, address: int, _: mmap.mmap) -> None:
    if os.getpid() == owner:
        cudart = _cudart()
        cudart.cudaHostUnregister(address)


def _keep_unmapped() -> None:
    """In a forked process, where our memory is a hole that its own allocations may fill.

    To free an inherited block there would unmap whatever lies in its place by then.
    """
    _INHERITED.extend(_MEMORIES)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_unmapped)
