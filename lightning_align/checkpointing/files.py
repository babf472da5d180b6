"""A folder of files, on a local disk or behind any fsspec URL.

Only what an object store can do, too, is used: nothing is renamed or written in place.
"""

import contextlib
import os
import stat
from collections.abc import Iterable
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lightning_align._errors import argument_error
from lightning_align.durable import sync_path

CHUNK_BYTES = 8 << 20

Bytes = bytes | memoryview


class Folder:
    """Files of one folder, by name.

    Args:
        dirpath: Local path or URL.
        storage_options: Passed to the filesystem of the URL.

    Raises:
        ValueError: If ``dirpath`` is no path, or its filesystem is not installed.
    """

    def __init__(
        self, dirpath: str | os.PathLike[str], storage_options: dict[str, Any] | None = None
    ) -> None:
        path = os.fspath(dirpath)
        if not isinstance(path, str) or not path:
            raise argument_error("checkpointing", "dirpath", dirpath, "must be a path or a URL")
        try:
            self.fs, root = fsspec.core.url_to_fs(path, **(storage_options or {}))
        except (ImportError, ValueError) as error:
            raise argument_error("checkpointing", "dirpath", dirpath, str(error)) from error
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.root = os.path.abspath(root) if self.is_local else root.rstrip("/")
        self.options = dict(storage_options or {})

    @property
    def key(self) -> str:
        """The same for all paths of one folder."""
        return os.path.realpath(self.root) if self.is_local else str(self)

    def __str__(self) -> str:
        return self.root if self.is_local else str(self.fs.unstrip_protocol(self.root))

    def path(self, name: str) -> str:
        """Path or URL of a file."""
        return f"{self}/{name}"

    def create(self) -> None:
        """Make the folder, if there is none.

        Raises:
            ValueError: If it, or what it would lie in, is a file.
        """
        try:
            self.fs.makedirs(self.root, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            there = self.root
            while self.is_local and not os.path.exists(there):
                there = os.path.dirname(there)
            rule = f"must be a folder, and {there} is a file"
            way_out = "Give another folder"
            raise argument_error("checkpointing", "dirpath", str(self), rule, way_out) from error

    def names(self) -> list[str]:
        """Names of the files in the folder; none if there is no folder."""
        if self.is_local:
            return sorted(os.listdir(self.root)) if os.path.isdir(self.root) else []
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)

    def write(self, name: str, chunks: Iterable[Bytes]) -> None:
        """Write a file; when this returns it will survive a crash of the machine.

        Args:
            name: File name, without a folder.
            chunks: Its bytes in pieces, so that none has to be in memory as a whole.
        """
        if self.is_local:
            self._write_local(name, chunks)
            return
        with self.fs.open(f"{self.root}/{name}", "wb") as file:
            for chunk in chunks:
                file.write(chunk)

    def _write_local(self, name: str, chunks: Iterable[Bytes]) -> None:
        descriptor = os.open(self._local(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for chunk in chunks:
                rest = memoryview(chunk)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Make the entries of a local folder durable; files are by themselves."""
        if not self.is_local or os.name == "nt":
            return
        sync_path(self.root)

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading.

        Raises:
            ValueError: If it is a link, a folder or a pipe.
        """
        if self.is_local:
            self._check_regular(name)
            return open(self._local(name), "rb")
        return cast(BinaryIO, self.fs.open(f"{self.root}/{name}", "rb"))

    def read(self, name: str, limit: int = -1) -> bytes:
        """Bytes of a file.

        Args:
            name: File name, without a folder.
            limit: How many at most; by default all.
        """
        with self.open(name) as file:
            return file.read(limit)

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; ``None`` if there is none.

        Raises:
            ValueError: If it is a link, a folder or a pipe.
        """
        try:
            if self.is_local:
                return self._check_regular(name)
            self.fs.invalidate_cache(self.root)
            return int(self.fs.size(f"{self.root}/{name}"))
        except FileNotFoundError:
            return None

    def delete(self, name: str) -> None:
        """Delete a file, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            if self.is_local:
                os.unlink(self._local(name))
            else:
                self.fs.rm_file(f"{self.root}/{name}")

    def _check_regular(self, name: str) -> int:
        """Size of a local file that is one: what a link points to is not kept for its sake."""
        status = os.lstat(self._local(name))
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name} is no regular file")
        return status.st_size

    def _local(self, name: str) -> str:
        return os.path.join(self.root, name)
