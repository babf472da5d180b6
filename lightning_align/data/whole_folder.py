"""Folders and files that are whole or not there, whatever happens to the process that writes them.

A folder is written under another name, file by file forced to the disk, its manifest last, and then
renamed: a folder of the final name is complete. What a killed process leaves has the other name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_align.durable import sync_path

MANIFEST = "manifest.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileWriter:
    """Writes one file, keeping its size and hash, and forces it to the disk in the end."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self._digest = hashlib.blake2b(digest_size=16)
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append ``data``."""
        self._stream.write(data)
        self._digest.update(data)
        self._size += len(data)

    def close(self) -> dict[str, Any]:
        """Force the file to the disk; returns what a manifest says about it."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return {"size": self._size, "hash": self._digest.hexdigest()}


def write_whole(folder: Path, key: str, write: Callable[[Path], dict[str, Any]]) -> None:
    """Write a folder that is complete once it is there; another of that name makes way to it.

    The caller sees to it that nobody else writes it at the same time.

    Args:
        folder: Where it will be.
        key: What it is; the manifest says so.
        write: Writes the files into the folder that it is given, and returns the manifest: under
            ``files`` what ``FileWriter.close`` returned, by name.

    Raises:
        OSError: If it cannot be written. Nothing of it is left, then.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        manifest = write(temporary)
        writer = FileWriter(temporary / MANIFEST)
        writer.write(json.dumps({"key": key, **manifest}, indent=1).encode())
        writer.close()
        sync_path(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        sync_path(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_whole_file(path: Path, data: bytes, writer: str) -> None:
    """Write a file that is complete once it is there, in place of another of that name.

    Args:
        path: Where it will be; the folder is there.
        data: All of it.
        writer: Who writes it: no two that live at the same time are called the same.

    Raises:
        OSError: If it cannot be written. Nothing of it is left, then.
    """
    temporary = path.with_name(f"{path.name}.{writer}.tmp")
    try:
        stream = FileWriter(temporary)
        stream.write(data)
        stream.close()
        temporary.replace(path)
        sync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def problem_of(folder: Path, key: str, *, read_all: bool = True) -> str | None:
    """Why a folder cannot be used, or None.

    Args:
        folder: What ``write_whole`` wrote.
        key: What it should be.
        read_all: Whether to compare hashes, for which all is read, or sizes alone.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["key"] != key:
            return "it is the manifest of another one"
        for name, expected in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes and not {expected['size']}"
            if read_all and hash_of(folder / name) != expected["hash"]:
                return f"the content of {name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def hash_of(path: Path) -> str:
    """The hash that ``FileWriter`` keeps, of a file that is there."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
