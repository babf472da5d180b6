"""Memory that was freed and that glibc keeps for later."""

import ctypes
import sys

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def give_back_freed() -> None:
    """Give freed memory back to the system now, and large pieces of it from now on at once.

    Tensors of up to 32 MB may lie in glibc's heap, which shrinks from its top only: a model that is
    let go tensor by tensor stays resident below whatever was allocated last, and gradients that
    come and go block by block take fresh heap each time. What is mapped by itself goes back when it
    is freed; that begins at 1 MiB then, in the whole process, for what finds no hole in the heap.
    Without glibc nothing is done.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # musl has neither
            library.mallopt(_MMAP_THRESHOLD, 1 << 20)
            library.malloc_trim(0)
