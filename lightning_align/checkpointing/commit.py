"""How a checkpoint comes to be, goes, and what is left of one when a run is killed."""

import time
import warnings
from collections.abc import Iterable
from typing import Any

from lightning_align.checkpointing.files import Bytes, Folder
from lightning_align.checkpointing.manifest import (
    MANIFEST,
    WITHDRAWN,
    WRITING,
    Hashed,
    Manifest,
    belongs,
    check_size,
    read_manifest,
)


def commit(
    folder: Folder,
    name: str,
    step: int,
    files: dict[str, Iterable[Bytes]],
    metadata: dict[str, Any],
) -> Manifest:
    """Write a checkpoint's files, then its manifest.

    Args:
        folder: Where the files go, all side by side.
        name: The checkpoint's, from which the manifest's is made.
        step: Optimizer steps that the state is the result of.
        files: Chunks of bytes by file name, written in the order of the dict.
        metadata: Plain values to keep in the manifest.

    Raises:
        ValueError: If a file is gone, or cut off, when the manifest should be written.
    """
    folder.write(name + WRITING, [b""])
    stored = []
    for file_name, chunks in files.items():
        hashed = Hashed(chunks)
        folder.write(file_name, hashed)
        stored.append(hashed.stored(file_name))
    folder.sync()
    for file in stored:  # a second run that took the folder for its own has swept them
        check_size(folder, file)
    manifest = Manifest(name, step, tuple(stored), metadata, time.time())
    folder.write(name + MANIFEST, [manifest.to_json()])
    folder.sync()
    folder.delete(name + WRITING)
    return manifest


def remove(folder: Folder, name: str, files: Iterable[str], announce: bool = True) -> None:
    """Delete a checkpoint: first what makes it one, then its files.

    Args:
        folder: Where its files lie.
        name: The checkpoint's, not a file's.
        files: What the manifest lists, which is gone by then.
        announce: Whether to say first that they will be incomplete; a save that failed has done so.
    """
    if announce:
        folder.write(name + WRITING, [b""])
    folder.delete(name + MANIFEST)
    folder.sync()
    for file in files:
        folder.delete(file)
    folder.delete(name + WRITING)


def withdraw(folder: Folder, name: str) -> None:
    """Say of a checkpoint, which may still be being written, that its run has gone back behind it.

    Args:
        folder: Where its files lie.
        name: The checkpoint's.
    """
    folder.write(name + WITHDRAWN, [b""])
    folder.sync()


def sweep(folder: Folder) -> list[str]:
    """Delete what saves that were interrupted have left; only one run may be writing here.

    Returns:
        Names of the files that were deleted.
    """
    names = folder.names()
    swept = []
    for marker in [name for name in names if name.endswith(WRITING)]:
        name = marker.removesuffix(WRITING)
        try:
            for leftover in _leftovers(folder, name, names):
                folder.delete(leftover)
                swept.append(leftover)
            folder.delete(marker)
        except OSError as error:
            warnings.warn(f"{folder.path(marker)} is passed over: {error}.", stacklevel=2)
    left = set(names) - set(swept)
    for marker in [name for name in names if name.endswith(WITHDRAWN)]:
        if marker.removesuffix(WITHDRAWN) + MANIFEST not in left:  # it came to nothing
            folder.delete(marker)
            swept.append(marker)
    return swept


def _leftovers(folder: Folder, name: str, names: list[str]) -> list[str]:
    """Files of a checkpoint that was announced, unless it is whole."""
    try:
        read_manifest(folder, name)
    except (ValueError, FileNotFoundError):
        return [file for file in names if file == name + MANIFEST or belongs(file, name)]
    return []
