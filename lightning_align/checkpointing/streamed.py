"""A file as torch.save writes it, written piece by piece: what files show is never copied."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning_align.checkpointing.files import Bytes, Folder
from lightning_align.checkpointing.frozen import freeze
from lightning_align.checkpointing.snapshot import HostBuffer


def pieces(state: Any) -> Iterator[Bytes]:
    """The bytes of the file, one piece after the other.

    Args:
        state: Nested dicts, lists and tuples of tensors and other values.

    Raises:
        ValueError: If the state cannot be saved.
    """
    structure, tensors = freeze(state)
    buffer = HostBuffer()
    buffer.copy(tensors, state)
    return buffer.file(structure)


def save_streamed(state: Any, path: str | os.PathLike[str]) -> None:
    """Write a state; the file is there as a whole, and durable, or not at all.

    Args:
        state: Nested dicts, lists and tuples of tensors and other values.
        path: Path or URL of the file.

    Raises:
        ValueError: If the state cannot be saved.
    """
    directory, _, name = os.fspath(path).replace(os.sep, "/").rpartition("/")
    folder = Folder(directory or ".")
    folder.create()
    if not folder.is_local:
        folder.write(name, pieces(state))
        return
    unfinished = f".{name}.unfinished"
    with ExitStack() as undo:
        undo.callback(folder.delete, unfinished)
        folder.write(unfinished, pieces(state))
        Path(folder.path(unfinished)).replace(folder.path(name))
        undo.pop_all()
    folder.sync()
