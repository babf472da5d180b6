"""Parts of files shown as memory: tensors that are read when they are looked at, and never before.

What is shown takes no memory of its own: pages come from the page cache, which the system may empty
at any time. Who changes such a tensor changes a copy of the pages that he touches, never the file.
The file itself must stay as it is for as long as the tensors live; ``on_end`` tells when that is.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import resource
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_FIXED = 0x10  # MAP_FIXED: Python's mmap has no name for it
_FAILED = ctypes.c_void_p(-1).value
_MAPPED: dict[int, tuple[int, object]] = {}  # address -> its end, and what the caller says it is
_STARTS: list[int] = []  # the same addresses, in order
_LOCK = threading.RLock()  # what is mapped may end on any thread, also while one holds the lock


class Part(NamedTuple):
    """A part of an open file; the offset, and all lengths but the last, are multiples of a page."""

    descriptor: int
    offset: int
    nbytes: int


def mapped(
    parts: Sequence[Part],
    source: object = None,
    on_end: Callable[[], None] = lambda: None,
    *,
    may_be_fixed: bool = False,
) -> Tensor:
    """Bytes of parts of files, one behind the other.

    Args:
        parts: Of which files; they may be closed and their names deleted afterwards.
        source: What ``source_of`` says of tensors that are views of this one; nobody may change
            these, then.
        on_end: Called when the last of them is gone.
        may_be_fixed: Whether it is enough that they can be read, where the system limits memory
            that can be changed.

    Raises:
        OSError: If the system refuses.
    """
    nbytes = sum(part.nbytes for part in parts)
    if not nbytes:
        on_end()
        return torch.empty(0, dtype=torch.uint8)
    address = _map(None, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0, 0)  # a place
    # RLIMIT_DATA counts what may be changed, though nothing is.
    limited = resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY
    protection = mmap.PROT_READ | (0 if limited and may_be_fixed else mmap.PROT_WRITE)
    start = address
    for part in parts:
        flags = mmap.MAP_PRIVATE | _FIXED
        _map(start, part.nbytes, flags, part.descriptor, part.offset, protection)
        start += part.nbytes
    memory: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    owner = np.frombuffer(memory, np.uint8)
    with _LOCK:
        _MAPPED[address] = address + nbytes, source
        bisect.insort(_STARTS, address)
    weakref.finalize(owner, _unmap, address, nbytes, on_end).atexit = False
    return torch.frombuffer(owner, dtype=torch.uint8)


def _map(
    address: int | None, nbytes: int, flags: int, descriptor: int, offset: int, protection: int
) -> int:
    found: int = _libc.mmap(address, nbytes, protection, flags, descriptor, offset)
    if found == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"{nbytes:,} bytes of a file cannot be mapped")
    return found


def _unmap(address: int, nbytes: int, on_end: Callable[[], None]) -> None:
    with _LOCK:
        del _MAPPED[address]
        _STARTS.remove(address)
    _libc.munmap(address, nbytes)
    on_end()


def part_of(whole: Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in mapped bytes, as a storage of its own: who saves it saves nothing around it.

    Args:
        whole: From ``mapped``.
        offset: At which byte it begins.
        shape: Of the tensor.
        dtype: Of the tensor.
    """
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if not nbytes:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(whole.numpy()[offset : offset + nbytes], dtype=dtype).view(tuple(shape))


def source_of(tensor: Tensor) -> tuple[object, int] | None:
    """What a tensor shows, as ``mapped`` was told, and at which byte of it; None if nobody told."""
    address = tensor.data_ptr() if tensor.device.type == "cpu" else 0
    with _LOCK:
        place = bisect.bisect_right(_STARTS, address) - 1
        if place < 0:
            return None
        end, source = _MAPPED[_STARTS[place]]
        begin = _STARTS[place]
    return (source, address - begin) if source is not None and address < end else None
