"""Memory that was freed and that glibc keeps for later."""

import ctypes
import sys
from typing import Any

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
LARGE = 256 << 10  # bytes, once `map_large_allocations` was called
# Others are never kept: the most that the threshold comes to by itself, on 64 bits (mallopt(3)).
NEVER_KEPT = 32 << 20
_is_mapping = False


def map_large_allocations() -> None:
    """Give large pieces of memory back to the system as soon as they are freed, from now on.

    Tensors of up to 32 MB may lie in glibc's heap, which shrinks from its top only: gradients and
    activations that come and go block by block take fresh heap each time, because a hole that an
    aligned allocation leaves is too small for the next one. What is mapped by itself goes back when
    it is freed; that begins at 256 KiB then, in the whole process, for what finds no hole in the
    heap. Without glibc nothing is done.
    """
    global _is_mapping
    library = _library()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, LARGE)
        _is_mapping = True


def mapped_from() -> int | None:
    """Bytes from which on an allocation is mapped by itself in this process; None without glibc."""
    if _library() is None:
        return None
    return LARGE if _is_mapping else NEVER_KEPT


def give_back_freed(*, from_now_on: bool = True) -> None:
    """Give freed memory back to the system now.

    A model that is let go tensor by tensor stays resident below whatever was allocated last.

    Args:
        from_now_on: Whether large pieces are given back from now on at once, too. To map them anew
            costs 50 ms for each 100 MB, at every step.
    """
    if from_now_on:
        map_large_allocations()
    library = _library()
    if library is not None:
        library.malloc_trim(0)


def _library() -> Any:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None  # musl has neither
