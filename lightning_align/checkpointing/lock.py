"""One run writes a folder: retention of two would delete each other's checkpoints.

On a local filesystem the operating system holds the lock (flock) and drops it when the process
dies, so there are no stale ones. It belongs to the open file, not to the process: reading that file
for a copy of the folder, and closing it, takes nothing away. But a forked child has the open file,
too, and would hold the folder beyond the end of its parent; so it closes it.

An object store has no locks, nor have some network filesystems: there the owner's file holds a
number that goes up every few seconds, and an owner that stops counting is taken to be dead.
"""

import contextlib
import json
import os
import socket
import threading
import time
import warnings
from typing import Any

from lightning_align.checkpointing.files import Folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lightning_align.lock"
BEAT_S = 15.0
_LAST_BEAT_S = 5.0
_SILENT_BEATS = 3  # beats without a change after which an owner is dead

_HELD: dict[str, "FolderLock"] = {}  # by folder
_OPENING = threading.RLock()  # no fork while a lock file is open that is in no list yet


class FolderLock:
    """The right to write a folder, held until :meth:`release` or the end of the process.

    Args:
        folder: Which folder.
        where: What an error begins with; the folder goes into its braces.

    Attributes:
        method: What holds it: ``flock``, or ``beats`` in the owner's file.
        taken_over_by: Who has taken it, where it was held by beats that could not be written.
    """

    def __init__(self, folder: Folder, where: str = "SnapshotEngine(dirpath={!r})") -> None:
        self._folder = folder
        self._where = where
        self._owner: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "beat": 0,
        }
        self._key = folder.key
        self._path = os.path.join(folder.root, LOCK_FILE)
        self._descriptor: int | None = None
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="checkpoint-lock", daemon=True)
        self.method = ""
        self.taken_over_by: str | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RuntimeError: If another run, or another engine of this one, holds it.
        """
        with _OPENING:
            if self._key in _HELD:
                owner = f"another engine of this process (pid {os.getpid()})"
                raise RuntimeError(self._refusal(owner))
            _HELD[self._key] = self
        try:
            locks = self._folder.is_local and fcntl is not None and self._lock_file()
            if not locks:
                self._claim()
            self.method = "flock" if locks else "beats"
        finally:
            if not self.method:
                del _HELD[self._key]

    def ensure(self) -> None:
        """Make sure that the folder is still ours, before something is written there.

        Raises:
            RuntimeError: If another run has it.
        """
        if self.taken_over_by:
            raise RuntimeError(f"{self.taken_over_by} has taken over the folder")
        if self._descriptor is not None and not _is_at(self._descriptor, self._path):
            self._close()  # somebody has deleted the file, or the folder
            self._lock_file()

    def release(self) -> None:
        """Give the lock back."""
        if _HELD.get(self._key) is not self:
            return
        del _HELD[self._key]
        self._stop.set()
        if self.method == "flock":
            self._close()  # the file stays: deleting it would open a race
        elif self.taken_over_by is None:
            self._beats.join(_LAST_BEAT_S)  # else it may write the file after we deleted it
            with contextlib.suppress(Exception):
                self._folder.delete(LOCK_FILE)

    def leave_to_parent(self) -> None:
        """In a forked child: close the file, which unlocks nothing as long as the parent has it."""
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock_file(self) -> bool:
        """Lock the file; False on a filesystem that does not lock."""
        with _OPENING:
            while self._descriptor is None:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)  # closed by exec
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    owner = _described(_content(descriptor))
                    os.close(descriptor)
                    raise RuntimeError(self._refusal(owner)) from None
                except OSError as error:
                    self._warn_of_beats(descriptor, error)
                    return False
                if _is_at(descriptor, self._path):
                    self._descriptor = descriptor
                else:
                    os.close(descriptor)  # deleted in between
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(self._owner).encode(), 0)
        return True

    def _warn_of_beats(self, descriptor: int, error: OSError) -> None:
        if not os.fstat(descriptor).st_size:
            os.unlink(self._path)  # ours: an owner's is never empty
        os.close(descriptor)
        warnings.warn(
            f"{self._folder} cannot be locked ({error}). In the place of a lock its owner counts in"
            f" {LOCK_FILE}: a run that died on another host is noticed after"
            f" {_SILENT_BEATS * BEAT_S:.0f} s.",
            stacklevel=6,
        )

    def _claim(self) -> None:
        """Become the owner in the owner's file, once whoever is there is known to be dead."""
        owner = self._read()
        if owner is not None and not self._is_dead(owner):
            raise RuntimeError(self._refusal(_described(json.dumps(owner).encode())))
        if owner is not None:
            warnings.warn(
                f"{self._folder}: taking over the lock of {_described(json.dumps(owner).encode())},"
                " which is no longer running.",
                stacklevel=5,
            )
        self._write()
        self._beats.start()

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        pid = owner.get("pid")
        if owner.get("host") == self._owner["host"] and type(pid) is int and pid > 0:
            return pid == os.getpid() or not _runs(pid) or owner.get("started") != _started(pid)
        deadline = time.monotonic() + _SILENT_BEATS * BEAT_S
        while time.monotonic() < deadline:
            time.sleep(min(BEAT_S / 3, 1.0))
            now = self._read()
            if now is None:
                return True
            if now != owner:
                return False
        return True

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(Exception):  # a store that cannot be reached for a while
                owner = self._read()
                if owner and _identity(owner) != _identity(self._owner):
                    self.taken_over_by = _described(json.dumps(owner).encode())
                    return
                self._owner["beat"] = self._owner["beat"] + 1
                self._write()

    def _read(self) -> dict[str, Any] | None:
        """What the owner's file says; None if there is none, and nothing if it is damaged."""
        try:
            owner = json.loads(self._folder.read(LOCK_FILE, 4096))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _write(self) -> None:
        name = f"{LOCK_FILE}.{os.getpid()}" if self._folder.is_local else LOCK_FILE
        self._folder.write(name, [json.dumps(self._owner).encode()])
        if self._folder.is_local:  # at once, as a store does it: nobody reads half of it
            os.replace(os.path.join(self._folder.root, name), self._path)

    def _refusal(self, owner: str) -> str:
        return (
            f"{self._where.format(str(self._folder))}: {owner} is writing checkpoints there."
            " Give each run a folder of its own, or end the other one."
        )


def _content(descriptor: int) -> bytes:
    try:
        return os.pread(descriptor, 4096, 0)
    except OSError:  # where a lock keeps others from reading, too
        return b""


def _is_at(descriptor: int, path: str) -> bool:
    """Whether an open file is still that of the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _identity(owner: dict[str, Any]) -> tuple[Any, ...]:
    return owner.get("host"), owner.get("pid"), owner.get("started")


def _described(data: bytes) -> str:
    try:
        owner = json.loads(data)
        return f"another run (host {owner['host']}, pid {owner['pid']})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another run"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        return True
    return True


def _started(pid: int) -> str | None:
    """When a process began: its id alone may have been given to another one since."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rsplit(b")", 1)[1].split()[19].decode()
    except (OSError, IndexError):
        return None


def _after_fork_in_child() -> None:
    global _OPENING
    _OPENING = threading.RLock()
    for lock in _HELD.values():
        lock.leave_to_parent()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _OPENING.acquire(),
        after_in_parent=lambda: _OPENING.release(),
        after_in_child=_after_fork_in_child,
    )
