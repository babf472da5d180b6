"""A checkpoint as a folder of links: the files of blocks under second names, and what is not there.

Nothing of a block is copied: a checkpoint takes as long as a few system calls, and disk only as the
run writes new files in the place of those that it holds. In the folder are

``meta.pt``                 the checkpoint, with None where files have values
``rank00000/index.json``    which tensor is where: names that lead to it in the checkpoint, shape,
                            dtype, and pieces (file, offset in bytes, first element, elements)
``rank00000/00000.block``   a file of the store

A tensor may be in pieces, of one rank or of several, in any order; whoever reads puts them together
by their elements, so that the number of ranks is nobody's concern.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lightning_align._errors import argument_error
from lightning_align.durable import sync_path
from lightning_align.mapped import Part, mapped, part_of, source_of
from lightning_align.offload.files import DirectFile

META_FILE, INDEX_FILE = "meta.pt", "index.json"
FORMAT = 1
_AT_ONCE = 16  # files that are made durable

Path_ = tuple[Any, ...]  # names and numbers that lead to a value in nested dicts and lists


class Piece(NamedTuple):
    """Elements of a tensor, in a file."""

    file: str  # relative to the folder
    offset: int  # bytes
    start: int  # first element
    length: int  # elements


class _Entry(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[Piece]


class Stretch(NamedTuple):
    """Elements of a tensor, in a file of a store."""

    file: Any
    offset: int  # bytes
    start: int  # first element
    length: int  # elements


# Writing

_OUTLINES: Any = WeakIdKeyDictionary()  # tensor on meta -> what this rank has of it


def outline(shape: Sequence[int], dtype: torch.dtype, stretches: list[Stretch]) -> Tensor:
    """What stands in a checkpoint for a tensor that ranks have in parts.

    Args:
        shape: Of the whole tensor.
        dtype: Of the tensor.
        stretches: What this rank has of it.
    """
    if not math.prod(shape):
        return torch.empty(*shape, dtype=dtype)
    made = torch.empty(*shape, dtype=dtype, device="meta")
    _OUTLINES[made] = stretches
    return made


def link(
    checkpoint: dict[str, Any], folder: Path, rank: int, current: Collection[Any], ranks: int = 1
) -> dict[str, Any]:
    """Link the files that a checkpoint shows tensors of, and write the index of this rank.

    Args:
        checkpoint: Nested dicts and lists, with tensors that files show.
        folder: Of the checkpoint; it is there.
        rank: Of this process.
        current: Files that may be linked; tensors of others are left where they are.
        ranks: How many write indices.

    Returns:
        The checkpoint with None in the place of what is linked: the index has its shape.

    Raises:
        ValueError: If something was made of an ``outline``, as by ``half()``, and is nowhere.
    """
    own = folder / f"rank{rank:05d}"
    own.mkdir()
    names: dict[DirectFile, str] = {}
    entries: list[Any] = []
    lost: list[str] = []
    in_parts: list[Tensor] = []

    def walk(value: Any, path: Path_) -> Any:
        if isinstance(value, dict):
            copied = {key: walk(item, (*path, key)) for key, item in value.items()}
            return value if all(copied[key] is value[key] for key in copied) else copied
        if type(value) is list:
            return [walk(item, (*path, number)) for number, item in enumerate(value)]
        if type(value) is not Tensor:
            return value
        if value.is_meta:
            stretches = _OUTLINES.get(value)
            if stretches is None:
                lost.append("/".join(map(str, path)))
                return value
            in_parts.append(value)
        else:
            source: Any = source_of(value) if value.is_contiguous() else None
            if source is None or source[0][0] not in current:
                return value
            (file, begin), offset = source
            stretches = [Stretch(file, begin + offset, 0, value.numel())]
        pieces = [piece for each in stretches for piece in in_files(each, value.element_size())]
        if pieces:
            dtype = str(value.dtype).removeprefix("torch.")
            entries.append([path, list(value.shape), dtype, pieces])
        return None

    def in_files(stretch: Stretch, itemsize: int) -> Iterator[Piece]:
        file, offset, start, length = stretch
        for part, place, nbytes in file.pieces(offset, length * itemsize):
            name = names.setdefault(part, f"{own.name}/{len(names):05d}.block")
            yield Piece(name, place, start, nbytes // itemsize)
            start += nbytes // itemsize

    rest = {key: walk(value, (key,)) for key, value in checkpoint.items()}
    if lost and in_parts:
        rule = "it was made of a parameter of which each rank has a part, and has no values"
        way_out = (
            "Leave it as it is in on_save_checkpoint, or set save_distributed_checkpoint=False"
        )
        raise argument_error("save_checkpoint", "checkpoint", lost[0], rule, way_out)
    sizes = {}
    for file, name in names.items():
        file.link(place := folder / name)
        sizes[name] = os.stat(place).st_size
    index = {"format": FORMAT, "ranks": ranks, "files": sizes, "tensors": entries}
    body = json.dumps(index).encode()
    (own / INDEX_FILE).write_bytes(xxhash.xxh3_128_hexdigest(body).encode() + b"\n" + body)
    return rest


def make_durable(folder: Path) -> None:
    """Let all of a checkpoint outlive a loss of power; files of blocks have been made to.

    All at once: to one that waits for all of them a filesystem answers with one write of its
    journal and one flush of the drive, to one after the other with as many.
    """
    ranks = list(folder.glob("rank*"))
    paths = [folder / META_FILE, *(rank / INDEX_FILE for rank in ranks), *ranks, folder]
    with ThreadPoolExecutor(min(len(paths), _AT_ONCE)) as threads:
        list(threads.map(sync_path, paths))


# Reading


def is_linked(path: Path) -> bool:
    """Whether there is a checkpoint of this form, whole or damaged."""
    return (path / META_FILE).is_file() and (path / "rank00000" / INDEX_FILE).is_file()


def read(
    folder: Path, where: str, *, weights_only: bool | None, may_be_fixed: bool = False
) -> dict[str, Any]:
    """The checkpoint, with tensors that the files show; nothing is read before it is looked at.

    Args:
        folder: Of the checkpoint.
        where: Function or class that the user called, for error messages.
        weights_only: Whether to refuse anything but tensors and plain values.
        may_be_fixed: As of ``mapped``, for a caller who changes no tensor.

    Raises:
        ValueError: If files are missing, cut off or damaged.
    """
    try:
        entries = _entries(folder)
        checkpoint: dict[str, Any] = torch.load(
            folder / META_FILE, map_location="cpu", weights_only=weights_only, mmap=True
        )
    except (ValueError, OSError, RuntimeError, EOFError, KeyError) as error:
        rule = f"the folder is no whole checkpoint: {str(error).splitlines()[0]}"
        way_out = "Copy the whole folder, or take another checkpoint"
        raise argument_error(where, "ckpt_path", str(folder), rule, way_out) from error
    files = _Files(folder, may_be_fixed)
    for path, entry in entries.items():
        owner = checkpoint
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = files.tensor(entry)
    return checkpoint


def _entries(folder: Path) -> dict[Path_, _Entry]:
    entries: dict[Path_, _Entry] = {}
    indices = list(_indices(folder))
    missing = max(index.get("ranks", 1) for index in indices) - len(indices)
    if missing > 0:  # some tensors are in the files of one rank only
        raise ValueError(f"the files of {missing} rank(s) are missing")
    for index in indices:
        for file, size in index["files"].items():
            path = folder / file
            if not path.is_file() or path.stat().st_size < size:
                raise ValueError(f"{file} is missing or cut off")
        for names, shape, dtype, pieces in index["tensors"]:
            entry = _Entry(tuple(shape), getattr(torch, dtype), [])
            found = entries.setdefault(tuple(names), entry)
            found.pieces.extend(Piece(*piece) for piece in pieces)
    for path, entry in entries.items():
        if sum(piece.length for piece in entry.pieces) != math.prod(entry.shape):
            raise ValueError(f"parts of {path[-1]!r} are missing")
    return entries


def _indices(folder: Path) -> Iterator[dict[str, Any]]:
    paths = sorted(folder.glob(f"rank*/{INDEX_FILE}"))
    if not paths:
        raise ValueError(f"no {INDEX_FILE} in it")
    for path in paths:
        digest, _, body = path.read_bytes().partition(b"\n")
        if xxhash.xxh3_128_hexdigest(body).encode() != digest:
            raise ValueError(f"{path.parent.name}/{path.name} is damaged: its digest differs")
        index: dict[str, Any] = json.loads(body)
        if index["format"] != FORMAT:
            raise ValueError(
                f"{path.name} is of format {index['format']}: a newer version wrote it"
            )
        yield index


class _Files:
    """The files of a folder as they are shown."""

    def __init__(self, folder: Path, may_be_fixed: bool) -> None:
        self._folder, self._may_be_fixed = folder, may_be_fixed
        self._shown: dict[str, Tensor] = {}

    def tensor(self, entry: _Entry) -> Tensor:
        if len(entry.pieces) == 1:
            piece = entry.pieces[0]
            return part_of(self._bytes(piece.file), piece.offset, entry.shape, entry.dtype)
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for piece in entry.pieces:
            part = part_of(self._bytes(piece.file), piece.offset, (piece.length,), entry.dtype)
            whole.view(-1)[piece.start : piece.start + piece.length] = part
        return whole

    def _bytes(self, file: str) -> Tensor:
        if file not in self._shown:
            with (self._folder / file).open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                parts = [Part(stream.fileno(), 0, size)]
                self._shown[file] = mapped(parts, may_be_fixed=self._may_be_fixed)
        return self._shown[file]
