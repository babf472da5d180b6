"""What autograd saves in a forward and reads in backward, away from memory in between.

Backward reads in the reverse order of forward. So what forward saves is copied and written behind
it, one after the other into one file, and backward reads ahead of itself in that file, from its end
to its beginning. The latest copies are still in memory when backward begins.

Moved is the whole storage of a tensor, once, however many views of it are saved: that is what
would stay in memory. Under activation checkpointing, reentrant or not, a block saves its inputs
alone, and those are moved; without it, all that its operations save.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_align._compat.torch_storage import expiry, identity
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.device import Copies, Event
from lightning_align.offload.files import DirectFile, Threads, Transfer
from lightning_align.offload.places import aligned

FILE = "activations"
LEAST_BYTES = 64 << 10  # of a storage: what is smaller stays
_UNDER_WAY = 2  # copies being written, and copies being read ahead


class _Copy:
    """A storage's bytes.

    Args:
        number: In the order of forward.
        offset: Where in the file they are.
        nbytes: How many.
        device: Where they came from.
    """

    def __init__(self, number: int, offset: int, nbytes: int, device: torch.device) -> None:
        self.number, self.offset, self.nbytes, self.device = number, offset, nbytes, device
        self.memory: Tensor | None = None
        self.there: Tensor | None = None  # again, where it came from
        self.event: Event | None = None  # of the copy from there
        self.source: Tensor | None = None  # until then, of what version
        self.version = 0
        self.transfer = Transfer([])


class Moved(NamedTuple):
    """A tensor whose storage was moved."""

    copy: _Copy
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Activations:
    """Saved tensors that are away from memory; ``pack`` and ``unpack`` are autograd's hooks.

    Args:
        folder: Where the file is; None leaves in host memory what a device has copied there.
        threads: Who reads and writes.
        copies: To and from that device; None where the host computes.
        pinned: Whether to register host memory with CUDA.
    """

    def __init__(
        self,
        folder: Path | None,
        threads: Threads,
        copies: Copies | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        self._file, self._copies = None, copies
        self._device = torch.device("cpu") if copies is None else copies.device
        if folder is not None:
            self._file = DirectFile(folder / FILE, threads)
            self._file.path.unlink()  # nothing of it is left by a kill
        self._pool = BufferPool(pinned=pinned)
        self._end = self._number = 0
        self._live: weakref.WeakValueDictionary[int, _Copy] = weakref.WeakValueDictionary()
        # Storage -> what keeps its identity from others, its version then, number of its copy.
        self._known: dict[int, tuple[Callable[[], bool], int, int]] = {}
        self._leaving: deque[_Copy] = deque()  # from the device
        self._returning: list[tuple[Event, Tensor]] = []  # host memory that is being copied
        self._writing: deque[_Copy] = deque()

    def begin(self) -> None:
        """A forward begins; what an earlier one has saved and is still needed stays."""
        self.settle()
        self._known.clear()
        if not self._live:
            self._end = self._number = 0

    def settle(self) -> None:
        """Wait until all copies are in the file, and let their memory go."""
        while self._leaving:
            self._write_oldest()
        while self._writing:
            self._settle_oldest()
        for event, _ in self._returning:
            event.wait()
        self._returning.clear()

    def pack(self, tensor: Tensor) -> Tensor | Moved:
        """Move a tensor's storage, if that is large.

        Args:
            tensor: What autograd saves; strided.
        """
        storage = tensor.untyped_storage()
        is_there = self._file is None and self._copies is None
        if is_there or tensor.device != self._device or storage.nbytes() < LEAST_BYTES:
            return tensor
        if type(tensor) is not Tensor or tensor.is_meta or tensor.is_conj() or tensor.is_neg():
            return tensor
        where = int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
        return Moved(self._copied(storage, tensor), tensor.dtype, *where)

    def unpack(self, moved: Moved) -> Tensor:
        """The tensor again."""
        copy = moved.copy
        self._read(copy)
        self._read_ahead(copy.number)
        copy.transfer.wait()
        memory = copy.memory if self._copies is None else self._there(copy, self._copies)
        assert memory is not None
        empty = torch.empty(0, dtype=moved.dtype, device=copy.device)
        storage = memory.untyped_storage()
        return empty.set_(storage, moved.offset, moved.shape, moved.stride)

    def _there(self, copy: _Copy, copies: Copies) -> Tensor:
        if copy.there is None:
            while copy in self._leaving:
                self._write_oldest()
            assert copy.memory is not None
            copy.there, event = copies.to_device(copy.memory[: copy.nbytes])
            event.compute_waits()
            self._returning = [each for each in self._returning if not each[0].is_done]
            self._returning.append((event, copy.memory))
        return copy.there

    def close(self) -> None:
        """Close the file; what is in it is lost."""
        self.settle()
        if self._file is not None:
            self._file.close()

    def _copied(self, storage: torch.UntypedStorage, tensor: Tensor) -> _Copy:
        key, version = identity(storage), tensor._version
        known = self._known.get(key)
        if known is not None and known[1] == version:
            found = self._live.get(known[2])
            if found is not None:
                return found
        copy = self._copy(storage, tensor)
        self._known[key] = expiry(storage), version, copy.number
        self._live[copy.number] = copy
        return copy

    def _copy(self, storage: torch.UntypedStorage, tensor: Tensor) -> _Copy:
        copy = _Copy(self._number, self._end, storage.nbytes(), storage.device)
        self._number, self._end = self._number + 1, self._end + aligned(copy.nbytes)
        copy.memory = self._pool.take(aligned(copy.nbytes))
        theirs = torch.empty(0, dtype=torch.uint8, device=copy.device).set_(storage)
        if self._copies is None:
            copy.memory[: copy.nbytes].copy_(theirs)
            self._write(copy)
            return copy
        copy.event = self._copies.to_host(theirs, copy.memory[: copy.nbytes])
        copy.source, copy.version = tensor.detach(), tensor._version
        self._leaving.append(copy)
        if len(self._leaving) > _UNDER_WAY:
            self._write_oldest()
        return copy

    def _write_oldest(self) -> None:
        copy = self._leaving.popleft()
        assert copy.event is not None
        copy.event.wait()
        if copy.source is not None and copy.source._version != copy.version:  # who knows when
            raise RuntimeError(
                "A tensor that autograd has saved was modified in place while it was copied from"
                " the device. Set offload_activations='none', or leave the operation's inplace out."
            )
        copy.source = None
        self._write(copy)

    def _write(self, copy: _Copy) -> None:
        if self._file is not None:
            assert copy.memory is not None
            copy.transfer = self._file.write(copy.memory, copy.offset)
            self._writing.append(copy)
            if len(self._writing) > _UNDER_WAY:
                self._settle_oldest()

    def _settle_oldest(self) -> None:
        copy = self._writing.popleft()
        copy.transfer.wait()
        copy.memory = None

    def _read(self, copy: _Copy) -> None:
        if copy.memory is None:
            assert self._file is not None
            copy.memory = self._pool.take(aligned(copy.nbytes))
            copy.transfer = self._file.read(copy.memory, copy.offset)

    def _read_ahead(self, number: int) -> None:
        earlier = (self._live.get(before) for before in range(number - 1, -1, -1))
        for _, copy in zip(range(_UNDER_WAY), filter(None, earlier), strict=False):
            self._read(copy)
