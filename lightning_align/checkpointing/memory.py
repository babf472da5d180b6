"""Copying memory: plain memmove, several threads on what is large.

One core cannot fill the memory bus, and while a state is copied the training thread has nothing
else to do. A tensor's bytes are copied as they are, whatever its dtype.
"""

import ctypes
import os
from collections import deque
from collections.abc import Iterator, Sequence
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
        small = [piece for piece in pieces if piece[2] < LARGE_BYTES]
        self._small: list[tuple[int, ...]] = list(zip(*small, strict=True)) or [(), (), ()]
        large = [piece for piece in pieces if piece[2] >= LARGE_BYTES]
        self._chunks = [chunk for piece in large for chunk in _chunked(*piece)]
        self._helpers = (num_threads or min(_MAX_THREADS, _num_cores())) - 1
        if sum(nbytes for _, _, nbytes in large) < _PARALLEL_BYTES:
            self._helpers = 0

    def run(self) -> None:
        """Copy all of them."""
        # Whoever is free takes the next: a helper that the system lets wait holds nobody up.
        todo = deque(self._chunks)
        helpers = min(self._helpers, _idle_cores()) if self._helpers else 0
        futures = [_pool().submit(_copy_from, todo) for _ in range(helpers)]
        deque(map(_copy_small, *self._small), maxlen=0)  # no loop of the interpreter
        _copy_from(todo)
        for future in futures:
            if not future.cancel():
                future.result()


def _copy_from(todo: deque[Copy]) -> None:
    while True:
        try:
            piece = todo.popleft()
        except IndexError:
            return
        _copy_large(*piece)


def _chunked(to: int, source: int, nbytes: int) -> Iterator[Copy]:
    for start in range(0, nbytes, _CHUNK_BYTES):
        yield to + start, source + start, min(_CHUNK_BYTES, nbytes - start)


def _pool() -> ThreadPoolExecutor:
    process = os.getpid()
    if process not in _POOL:
        _POOL.clear()
        _POOL[process] = ThreadPoolExecutor(_MAX_THREADS - 1, "checkpoint-copy")
    return _POOL[process]


def _idle_cores() -> int:
    """Cores that nothing runs on; a helper on a busy one would be waited for."""
    try:
        with open("/proc/loadavg", "rb") as file:
            running = int(file.read().split()[3].split(b"/")[0])
    except (OSError, ValueError, IndexError):
        running = 1
    return max(0, _num_cores() - running)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
