"""Copying memory: plain memmove, several threads on what is large.

One core cannot fill the memory bus, and while a state is copied the training thread has nothing
else to do. A tensor's bytes are copied as they are, whatever its dtype.
"""

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

LARGE_BYTES = 1 << 17  # from here on a copy is worth giving up the interpreter lock
_PARALLEL_BYTES = 1 << 23  # from here on it is worth waking other threads
_CHUNK_BYTES = 1 << 22
_MAX_THREADS = 4  # more do not copy faster

Copy = tuple[int, int, int]  # address to write, address to read, bytes

# The same memmove twice: the first lets other threads run, which costs more than a small copy.
_copy_large: Any = ctypes.memmove
_copy_small: Any = ctypes.PYFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0)

_POOL: dict[int, ThreadPoolExecutor] = {}  # by process: threads do not survive a fork


class Copies:
    """Pieces of memory to copy again and again.

    Args:
        pieces: Where to, where from, how many bytes.
        num_threads: How many threads copy; by default as many as there are cores, up to four.
    """

    def __init__(self, pieces: Sequence[Copy], num_threads: int | None = None) -> None:
        self._small = [piece for piece in pieces if piece[2] < LARGE_BYTES]
        large = [piece for piece in pieces if piece[2] >= LARGE_BYTES]
        threads = num_threads or min(_MAX_THREADS, _num_cores())
        if sum(nbytes for _, _, nbytes in large) < _PARALLEL_BYTES:
            threads = 1
        self._shares = _shares(large, threads)

    def run(self) -> None:
        """Copy all of them."""
        mine, *others = self._shares
        futures = [_pool().submit(_copy_all, share) for share in others]
        for piece in self._small:
            _copy_small(*piece)
        _copy_all(mine)
        for future in futures:
            future.result()


def _copy_all(pieces: list[Copy]) -> None:
    for piece in pieces:
        _copy_large(*piece)


def _shares(pieces: list[Copy], num_threads: int) -> list[list[Copy]]:
    """Divide pieces so that each thread copies as many bytes."""
    if num_threads == 1:
        return [pieces]
    shares: list[list[Copy]] = [[] for _ in range(num_threads)]
    sizes = [0] * num_threads
    for to, source, nbytes in pieces:
        for start in range(0, nbytes, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, nbytes - start)
            least = sizes.index(min(sizes))
            shares[least].append((to + start, source + start, size))
            sizes[least] += size
    return shares


def _pool() -> ThreadPoolExecutor:
    process = os.getpid()
    if process not in _POOL:
        _POOL.clear()
        _POOL[process] = ThreadPoolExecutor(_MAX_THREADS - 1, "checkpoint-copy")
    return _POOL[process]


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
