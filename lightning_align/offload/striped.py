"""One file in pieces that alternate over several drives, so that all of them move it at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from lightning_align.offload.files import DirectFile, Threads, Transfer

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

    def read(self, memory: Tensor, offset: int) -> Transfer:
        """Fill ``memory`` from the file, as ``DirectFile`` does."""
        return self._each_piece(DirectFile.read, memory, offset)

    def write(self, memory: Tensor, offset: int) -> Transfer:
        """Write ``memory`` to the file, as ``DirectFile`` does."""
        return self._each_piece(DirectFile.write, memory, offset)

    def sync(self) -> Transfer:
        """Make what was written durable on all drives."""
        return Transfer.of_all(part.sync() for part in self.parts)

    def allocate(self, nbytes: int) -> None:
        """Reserve room on each drive.

        Raises:
            OSError: If there is none.
        """
        rounds, rest = divmod(nbytes, STRIPE * len(self.parts))
        for number, part in enumerate(self.parts):
            part.allocate(rounds * STRIPE + min(max(rest - number * STRIPE, 0), STRIPE))

    def close(self) -> None:
        """Close the files."""
        for part in self.parts:
            part.close()

    def _each_piece(
        self, move: Callable[[DirectFile, Tensor, int], Transfer], memory: Tensor, offset: int
    ) -> Transfer:
        transfers, done = [], 0
        while done < len(memory):
            piece, inside = divmod(offset + done, STRIPE)
            row, drive = divmod(piece, len(self.parts))
            end = min(done + STRIPE - inside, len(memory))
            transfers.append(move(self.parts[drive], memory[done:end], row * STRIPE + inside))
            done = end
        return Transfer.of_all(transfers)


def open_file(folders: Sequence[Path], name: str, threads: Threads) -> DirectFile | StripedFile:
    """A file of a store, striped where the store has several folders.

    Args:
        folders: Of the store, one on each drive.
        name: Of the file.
        threads: Who reads and writes.
    """
    paths = [folder / name for folder in folders]
    return DirectFile(paths[0], threads) if len(paths) == 1 else StripedFile(paths, threads)
