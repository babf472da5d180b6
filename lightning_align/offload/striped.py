"""One file in pieces that alternate over several drives, so that all of them move it at a time."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from lightning_align.mapped import mapped
from lightning_align.offload.files import DirectFile, Threads, Transfer

MARK = "drive"  # name of the file that says which of a store's folders this is
STRIPE = 4 << 20  # bytes of one piece, whatever the block size: it is how the drives are read


class StripedFile:
    """A file of which piece ``k`` is on drive ``k`` modulo their number.

    Args:
        paths: One on each drive.
        threads: Who reads and writes.
    """

    def __init__(self, paths: Sequence[Path], threads: Threads) -> None:
        self.parts = [DirectFile(path, threads) for path in paths]
        self.path = self.parts[0].path
        self._shown: list[None] = []

    def read(self, memory: Tensor, offset: int) -> Transfer:
        """Fill ``memory`` from the file, as ``DirectFile`` does."""
        return self._each_piece(DirectFile.read, memory, offset)

    def write(self, memory: Tensor, offset: int) -> Transfer:
        """Write ``memory`` to the file, as ``DirectFile`` does."""
        return self._each_piece(DirectFile.write, memory, offset)

    def sync(self) -> Transfer:
        """Make what was written durable on all drives."""
        return Transfer.of_all(part.sync() for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Length of all parts."""
        return sum(part.nbytes for part in self.parts)

    def allocate(self, nbytes: int) -> None:
        """Reserve room on each drive.

        Raises:
            OSError: If there is none.
        """
        rounds, rest = divmod(nbytes, STRIPE * len(self.parts))
        for number, part in enumerate(self.parts):
            part.allocate(rounds * STRIPE + min(max(rest - number * STRIPE, 0), STRIPE))

    @property
    def is_held(self) -> bool:
        """As of ``DirectFile``, of any part."""
        return bool(self._shown) or any(part.is_held for part in self.parts)

    def shown(self, offset: int, nbytes: int) -> Tensor:
        """As of ``DirectFile``."""
        self._shown.append(None)
        parts = [part.part(start, count) for part, start, count in self.pieces(offset, nbytes)]
        return mapped(parts, (self, offset), self._shown.pop, may_be_fixed=True)

    def rename(self, name: str) -> None:
        """As of ``DirectFile``, in the folder of each part."""
        for part in self.parts:
            part.rename(name)

    def close(self) -> None:
        """Close the files."""
        for part in self.parts:
            part.close()

    def _each_piece(
        self, move: Callable[[DirectFile, Tensor, int], Transfer], memory: Tensor, offset: int
    ) -> Transfer:
        transfers, done = [], 0
        for part, start, count in self.pieces(offset, len(memory)):
            transfers.append(move(part, memory[done : done + count], start))
            done += count
        return Transfer.of_all(transfers)

    def pieces(self, offset: int, nbytes: int) -> list[tuple[DirectFile, int, int]]:
        """As of ``DirectFile``."""
        found, end = [], offset + nbytes
        while offset < end:
            piece, inside = divmod(offset, STRIPE)
            row, drive = divmod(piece, len(self.parts))
            count = min(STRIPE - inside, end - offset)
            found.append((self.parts[drive], row * STRIPE + inside, count))
            offset += count
        return found


def open_file(folders: Sequence[Path], name: str, threads: Threads) -> DirectFile | StripedFile:
    """A file of a store, striped where the store has several folders.

    Args:
        folders: Of the store, one on each drive.
        name: Of the file.
        threads: Who reads and writes.
    """
    paths = [folder / name for folder in folders]
    return DirectFile(paths[0], threads) if len(paths) == 1 else StripedFile(paths, threads)


def mark_drives(folders: Sequence[Path]) -> None:
    """Write into each folder of a store which of how many it is; one alone needs no mark."""
    store = uuid.uuid4().hex
    for number, folder in enumerate(folders if len(folders) > 1 else ()):
        (folder / MARK).write_text(json.dumps([store, number, len(folders)]))


def check_drives(folders: Sequence[Path]) -> None:
    """Assert that the folders are those of one store, all of them and in their order.

    Raises:
        ValueError: If one is missing, or of another store or another place in the order.
    """
    first = _mark(folders[0])
    store, count = (first[0], first[2]) if first else ("", 1)
    if count != len(folders):
        raise ValueError(
            f"{folders[0]} is one of {count} folders over which files are striped, and"
            f" {len(folders)} are given. Name them all, in the same order. Nothing was touched."
        )
    for number, folder in enumerate(folders if count > 1 else ()):
        if _mark(folder) != [store, number, count]:
            raise ValueError(
                f"{folder} is not folder {number} of {count} of the store in {folders[0]}: a drive"
                " is missing, or the order is another one. Nothing was touched."
            )


def strangers(folders: Sequence[Path]) -> list[Path]:
    """Folders that have parts of another store, or of this one with other folders."""
    first = _mark(folders[0])
    store = first[0] if first else ""
    marks = [(folder, _mark(folder)) for folder in folders]
    return [
        folder
        for number, (folder, mark) in enumerate(marks)
        if mark and mark != [store, number, len(folders)]
    ]


def _mark(folder: Path) -> list[object]:
    path = folder / MARK
    found: list[object] = json.loads(path.read_text()) if path.is_file() else []
    return found
