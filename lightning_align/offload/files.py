"""Files that are read and written past the page cache, in pieces, by a few threads.

``preadv`` and ``pwritev`` give up the interpreter's lock, so plain threads keep a disk busy: two of
them with pieces of 4 MiB were as fast as any other number, and faster than what needs a compiler,
as long as the memory is private huge pages (see ``buffers``).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_align._errors import argument_error
from lightning_align.mapped import Part, mapped
from lightning_align.offload.traffic import READ, SYNC, WRITE, Traffic

ALIGNMENT = 4096  # bytes: offsets, lengths and addresses of direct transfers are multiples of it
_DIRECT = getattr(os, "O_DIRECT", 0)
# Another filesystem, one without links, or more of them than it has.
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)


@dataclass
class Threads:
    """What all files of a store share.

    Args:
        count: Threads that read and write.
        block_size: Bytes of one piece.
        direct_io: Whether to go past the page cache; ``"auto"`` does where the filesystem lets us.

    Raises:
        ValueError: If a value is out of its range.
    """

    count: int = 2
    block_size: int = 4 << 20
    direct_io: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise argument_error("offload", "thread_count", self.count, "must be at least 1")
        if self.block_size < ALIGNMENT or self.block_size % ALIGNMENT:
            rule = f"must be a multiple of {ALIGNMENT} bytes"
            raise argument_error("offload", "block_size", self.block_size, rule)
        self.traffic = Traffic()
        self.buffered_devices: set[int] = set()  # told once
        self.start()

    def start(self) -> None:
        """Have threads; a process that was forked does not take them along."""
        self.executor = ThreadPoolExecutor(self.count, thread_name_prefix="offload")

    def close(self) -> None:
        """Wait for what is under way, and end the threads."""
        self.executor.shutdown()


class Transfer:
    """Reads or writes that are under way.

    Args:
        pieces: What the threads do.
        traffic: Where waits are counted.
    """

    def __init__(self, pieces: Iterable[Future[None]] = (), traffic: Traffic | None = None) -> None:
        self._pieces = list(pieces)
        self._traffic = traffic or Traffic()

    @classmethod
    def of_all(cls, transfers: Iterable[Transfer]) -> Transfer:
        """One that is done when all of them are."""
        transfers = list(transfers)
        pieces = [piece for transfer in transfers for piece in transfer._pieces]
        return cls(pieces, transfers[0]._traffic if transfers else None)

    def wait(self) -> None:
        """Until all is done, also where a piece has failed; then raises the first such error."""
        pieces, self._pieces = self._pieces, []
        self._traffic.wait(pieces)
        for piece in pieces:
            piece.result()


class DirectFile:
    """One file of a store, made if it is not there.

    A request whose place, length or address is no multiple of ``ALIGNMENT`` goes through the page
    cache, also where others go past it.

    Args:
        path: Where it is.
        threads: Who reads and writes.

    Attributes:
        is_direct: Whether transfers go past the page cache.

    Raises:
        ValueError: If ``direct_io=True`` and the filesystem refuses it.
    """

    def __init__(self, path: Path, threads: Threads) -> None:
        self.path = path
        self._threads = threads
        self.is_direct = bool(threads.direct_io and _DIRECT)
        self._descriptor = self._open()
        self._cached: int | None = None  # for what is not aligned
        self._shown: list[None] = []  # one for each call of ``shown`` whose tensors live

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        if self.is_direct:
            try:
                return os.open(self.path, flags | _DIRECT, 0o666)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        descriptor = os.open(self.path, flags, 0o666)
        if self._threads.direct_io:
            self._tell_buffered(descriptor)
        return descriptor

    def _tell_buffered(self, descriptor: int) -> None:
        self.is_direct = False
        if self._threads.direct_io is True:
            rule = f"the filesystem of {self.path} has no direct I/O"
            raise argument_error("offload", "direct_io", True, rule, "Leave it at 'auto'")
        device = os.fstat(descriptor).st_dev
        if device not in self._threads.buffered_devices:
            self._threads.buffered_devices.add(device)
            warnings.warn(
                f"The filesystem of {self.path} has no direct I/O: transfers go through the page"
                " cache, which takes memory and time.",
                stacklevel=2,
            )

    def _go_buffered(self) -> None:
        """Some filesystems open a file for direct I/O, and refuse the first transfer."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
        self._tell_buffered(self._descriptor)

    def _descriptor_for(self, memory: Tensor, offset: int) -> int:
        place = (memory.data_ptr(), memory.numel(), offset)
        if not self.is_direct or not any(number % ALIGNMENT for number in place):
            return self._descriptor
        if self._cached is None:
            self._cached = os.open(self.path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        return self._cached

    def read(self, memory: Tensor, offset: int) -> Transfer:
        """Fill ``memory`` from the file.

        Args:
            memory: Bytes, contiguous.
            offset: Where in the file they begin.
        """
        self._threads.traffic.read += memory.numel()
        return self._start(READ, _read_piece, memory, offset)

    def write(self, memory: Tensor, offset: int) -> Transfer:
        """Write ``memory`` to the file; it must not change until the transfer is done.

        Args:
            memory: Bytes, contiguous.
            offset: Where in the file they begin.
        """
        self._threads.traffic.written += memory.numel()
        return self._start(WRITE, _write_piece, memory, offset)

    def sync(self) -> Transfer:
        """Make what was written durable; what is under way is not waited for."""
        traffic = self._threads.traffic
        return Transfer([self._threads.executor.submit(traffic.moves(SYNC, self._sync))], traffic)

    def _start(self, what: str, move: Callable[..., None], memory: Tensor, offset: int) -> Transfer:
        array: Any = memory.numpy()
        view = memoryview(array)  # holds the memory as long as a piece is under way
        size, descriptor = self._threads.block_size, self._descriptor_for(memory, offset)
        submit, traffic = self._threads.executor.submit, self._threads.traffic
        move = traffic.moves(what, move)
        pieces = [
            submit(move, self, descriptor, view[start : start + size], offset + start)
            for start in range(0, len(view), size)
        ]
        return Transfer(pieces, traffic)

    def _sync(self) -> None:
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise _told(self.path, "fdatasync", error) from error

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return os.fstat(self._descriptor).st_size

    def allocate(self, nbytes: int) -> None:
        """Reserve room, so that the disk cannot be full later.

        Args:
            nbytes: Length of the file.

        Raises:
            OSError: If there is none, with the bytes that are needed and that are free.
        """
        size = self.nbytes
        if nbytes <= size:
            return
        try:
            if nbytes - size > shutil.disk_usage(self.path.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(self._descriptor, 0, nbytes)
        except OSError as error:
            os.ftruncate(self._descriptor, size)  # ext4 keeps what it has got until there was none
            free = shutil.disk_usage(self.path.parent).free
            what = f"{nbytes - size:,} bytes are needed and {free:,} are free ({error.strerror})"
            raise OSError(error.errno, what, str(self.path)) from error

    # What stays as it is, while the store goes on

    @property
    def is_held(self) -> bool:
        """Whether what is in the file belongs to somebody else, too: it must not be written."""
        return bool(self._shown) or os.fstat(self._descriptor).st_nlink > 1

    def shown(self, offset: int, nbytes: int) -> Tensor:
        """Bytes of the file as memory that is read when it is looked at; they hold the file.

        Args:
            offset: Where in it; a multiple of ``ALIGNMENT``.
            nbytes: How many.
        """
        self._shown.append(None)
        return mapped(
            [self.part(offset, nbytes)], (self, offset), self._shown.pop, may_be_fixed=True
        )

    def part(self, offset: int, nbytes: int) -> Part:
        """Bytes of the file, for ``mapped``."""
        return Part(self._descriptor, offset, nbytes)

    def pieces(self, offset: int, nbytes: int) -> list[tuple[DirectFile, int, int]]:
        """Which bytes of which files these are: file, offset there, bytes."""
        return [(self, offset, nbytes)]

    def link(self, path: Path) -> None:
        """Give the file another name, which holds it; a copy where that cannot be.

        Args:
            path: That name; nothing may be there.

        Raises:
            OSError: If neither is possible.
        """
        try:
            os.link(self.path, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copyfile(self.path, path)
            with path.open("rb") as copy:
                os.fsync(copy.fileno())

    def rename(self, name: str) -> None:
        """Take the place of what has a name in the same folder."""
        self.path = self.path.replace(self.path.with_name(name))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
        if self._cached is not None:
            os.close(self._cached)


def filesystem(path: Path) -> str:
    """Kind of the filesystem that a folder is on, such as ``"ext4"``; ``""`` if it cannot be told.

    Args:
        path: Of the folder.
    """
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = Path("/proc/self/mountinfo")
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == number:
            return kind.split()[0]
    return ""


# A thread may hold on to what it was given for a while after all is done, and somebody may look
# whether the memory is free: so the view is released before.


def _read_piece(file: DirectFile, descriptor: int, piece: memoryview, offset: int) -> None:
    with piece:
        memory = piece
        while memory:
            count = _moved(file, descriptor, os.preadv, "reading", memory, offset)
            offset, memory = offset + count, memory[count:]
            size = os.fstat(descriptor).st_size
            if memory and offset >= size:
                short = f"reading stopped at {offset:,}: the file has {size:,} bytes and is"
                raise OSError(errno.EIO, f"{short} truncated", str(file.path))


def _write_piece(file: DirectFile, descriptor: int, piece: memoryview, offset: int) -> None:
    with piece:
        memory = piece
        while memory:
            count = _moved(file, descriptor, os.pwritev, "writing", memory, offset)
            offset, memory = offset + count, memory[count:]


def _moved(
    file: DirectFile, descriptor: int, call: Any, what: str, memory: memoryview, offset: int
) -> int:
    """Bytes that one call has moved, which may be fewer than asked for."""
    direct = file.is_direct and descriptor == file._descriptor
    try:
        count: int = call(descriptor, [memory], offset)
    except OSError as error:
        if direct and error.errno == errno.EINVAL:
            file._go_buffered()
            return _moved(file, descriptor, call, what, memory, offset)
        raise _told(file.path, f"{what} {len(memory):,} bytes at {offset:,}", error) from error
    # What is left of a call that stopped short must be aligned again.
    return count - count % ALIGNMENT or count if direct and count < len(memory) else count


def _told(path: Path, what: str, error: OSError) -> OSError:
    return OSError(error.errno, f"{what} failed: {error.strerror}", str(path))
