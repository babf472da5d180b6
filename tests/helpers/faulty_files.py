"""A filesystem behind a URL, ``faulty://``, that fails when told to, and files with a wrong bit."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FaultyFileSystem(MemoryFileSystem):
    """Memory, of which the tests see every operation before it happens.

    Like an object store it has no rename.
    """

    protocol = "faulty"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    before: Callable[[str, str], None] | None = None
    log: list[tuple[str, str]] = []  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        FaultyFileSystem.options = options

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    def _note(self, operation: str, path: str) -> None:
        name = path.rsplit("/", 1)[-1]
        FaultyFileSystem.log.append((operation, name))
        if FaultyFileSystem.before is not None:
            FaultyFileSystem.before(operation, name)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self._note("write" if "w" in mode else "read", path)
        return super()._open(path, mode, **kwargs)

    def rm_file(self, path: str) -> None:
        self._note("delete", path)
        self._rm(path)

    def mv(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("object stores have no rename")

    rename = mv
    move = mv


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


@contextmanager
def faulty(before: Callable[[str, str], None] | None = None) -> Iterator[FaultyFileSystem]:
    """An empty filesystem; ``before(operation, file name)`` may raise or wait.

    Args:
        before: Called before each operation.
    """
    FaultyFileSystem.store.clear()
    FaultyFileSystem.pseudo_dirs[:] = [""]
    FaultyFileSystem.log.clear()
    FaultyFileSystem.before = None if before is None else staticmethod(before)
    FaultyFileSystem.clear_instance_cache()
    try:
        yield FaultyFileSystem()
    finally:
        FaultyFileSystem.before = None


class Gate:
    """Holds writes of checkpoint data until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, operation: str, name: str) -> None:
        if operation == "write" and name.endswith(".ckpt"):
            self.reached.set()
            assert self.opened.wait(30)


def flip(path: Path, place: int) -> None:
    """Damage one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
