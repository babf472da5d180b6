"""One run writes a folder: retention of two would delete each other's checkpoints.

On a local filesystem the operating system holds the lock and drops it when the process dies, so
there are no stale ones. An object store has no locks: the owner's file holds a number that goes up
every few seconds, and an owner that stops counting is taken to be dead.
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
_SILENT_BEATS = 3  # beats without a change after which an owner is dead

_HELD: dict[str, int] = {}  # folder -> process: the system's locks do not tell engines apart


class FolderLock:
    """The right to write a folder, held until :meth:`release` or the end of the process.

    Args:
        folder: Which folder.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._owner: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "beat": 0,
        }
        self._descriptor: int | None = None
        self._stop = threading.Event()
        self.taken_over_by: str | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RuntimeError: If another run, or another engine of this one, holds it.
        """
        key = str(self._folder)
        if _HELD.get(key) == os.getpid():
            raise RuntimeError(self._refusal(f"another engine of this process (pid {os.getpid()})"))
        if self._folder.is_local and fcntl is not None:
            self._lock_file()
        else:
            self._claim()
        _HELD[key] = os.getpid()

    def release(self) -> None:
        """Give the lock back."""
        key = str(self._folder)
        if self._owner["pid"] != os.getpid() or key not in _HELD:
            return
        del _HELD[key]
        self._stop.set()
        if self._descriptor is not None:
            os.close(self._descriptor)  # the file stays: deleting it would open a race
            self._descriptor = None
        elif self.taken_over_by is None:
            with contextlib.suppress(Exception):
                self._folder.delete(LOCK_FILE)

    def _lock_file(self) -> None:
        path = os.path.join(self._folder.root, LOCK_FILE)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = _described(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            raise RuntimeError(self._refusal(owner)) from None
        except OSError as error:  # a filesystem without locks
            warnings.warn(
                f"{self._folder} cannot be locked ({error}): nothing keeps a second run from"
                " writing there.",
                stacklevel=5,
            )
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(self._owner).encode(), 0)
        self._descriptor = descriptor

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
        threading.Thread(target=self._beat, name="checkpoint-lock", daemon=True).start()

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        if owner.get("host") == self._owner["host"]:
            pid = owner.get("pid", 0)
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
                if owner is not None and _identity(owner) != _identity(self._owner):
                    self.taken_over_by = _described(json.dumps(owner).encode())
                    return
                self._owner["beat"] = self._owner["beat"] + 1
                self._write()

    def _read(self) -> dict[str, Any] | None:
        try:
            owner = json.loads(self._folder.read(LOCK_FILE))
        except (FileNotFoundError, ValueError):
            return None
        return owner if isinstance(owner, dict) else None

    def _write(self) -> None:
        self._folder.write(LOCK_FILE, [json.dumps(self._owner).encode()])

    def _refusal(self, owner: str) -> str:
        return (
            f"SnapshotEngine(dirpath={str(self._folder)!r}): {owner} is writing checkpoints there."
            " Give each run a folder of its own, or end the other one."
        )


def _identity(owner: dict[str, Any]) -> tuple[Any, ...]:
    return owner.get("host"), owner.get("pid"), owner.get("started")


def _described(data: bytes) -> str:
    try:
        owner = json.loads(data)
        return f"another run (host {owner['host']}, pid {owner['pid']})"
    except (ValueError, KeyError, TypeError):
        return "another run"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _started(pid: int) -> str | None:
    """When a process began: its id alone may have been given to another one since."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rsplit(b")", 1)[1].split()[19].decode()
    except (OSError, IndexError):
        return None
