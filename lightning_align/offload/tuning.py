"""Block size and number of threads that are fastest on a drive, measured and remembered.

DeepSpeed leaves that to a tool that is run before (``ds_nvme_tune``). Here it takes a second at
set-up. Settings decide how bytes travel, never which, so that a bad measurement costs time alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import DirectFile, Threads

FILE = "io_settings.json"
TRIAL = ".trial"  # suffix of the file that is written and read
DEFAULT = (4 << 20, 2)  # bytes, threads
SECONDS = 1.0
_SIZES, _COUNTS = (DEFAULT[0], 1 << 20, 16 << 20), (DEFAULT[1], 1, 4)
_MOST = 64 << 20  # bytes of a trial
_BETTER = 1.1  # times as fast as the default: less is noise


@dataclass(frozen=True)
class IOSettings:
    """How a drive is read and written.

    Attributes:
        block_size: Bytes of one read or write.
        thread_count: Threads that read and write.
        bandwidth: Bytes a second that a trial moved, half of them written; None if none was made.
    """

    block_size: int = DEFAULT[0]
    thread_count: int = DEFAULT[1]
    bandwidth: float | None = None

    @classmethod
    def given(cls, block_size: int | None, thread_count: int | None) -> IOSettings:
        """What is given, and the defaults for the rest."""
        size, count = DEFAULT
        size = size if block_size is None else block_size
        return cls(size, count if thread_count is None else thread_count)


def tuned(
    folder: Path,
    beside: Path,
    block_size: int | None,
    thread_count: int | None,
    direct_io: bool | Literal["auto"] = "auto",
) -> IOSettings:
    """What is given, and for the rest what was found to be fastest on the drive.

    Args:
        folder: On the drive; the trial's file is made and deleted there.
        beside: Folder of the file that remembers.
        block_size: Bytes of one transfer; None measures.
        thread_count: Threads; None measures.
        direct_io: As for the files of a store.
    """
    if block_size is not None and thread_count is not None:
        return IOSettings(block_size, thread_count)
    key = f"{os.stat(folder).st_dev}:{block_size}:{thread_count}"
    known = _remembered(beside / FILE)
    if key in known:
        return known[key]
    sizes = _SIZES if block_size is None else (block_size,)
    counts = _COUNTS if thread_count is None else (thread_count,)
    found = measured(folder, [(size, count) for size in sizes for count in counts], direct_io)
    _remember(beside / FILE, {**known, key: found})
    return found


def measured(
    folder: Path,
    candidates: Sequence[tuple[int, int]],
    direct_io: bool | Literal["auto"] = "auto",
    seconds: float = SECONDS,
) -> IOSettings:
    """The fastest of some settings; the first, unless another one is clearly faster.

    Args:
        folder: On the drive.
        candidates: Block size and threads, the usual ones first.
        direct_io: As for the files of a store.
        seconds: After which no further trial begins.
    """
    end = time.perf_counter() + seconds
    path = folder / f"{os.getpid()}{TRIAL}"
    try:
        memory = BufferPool().take(4 << 20).zero_()
        first = _seconds_of(path, memory, candidates[0], direct_io)  # also makes the file
        share = seconds / (3 * len(candidates))  # three trials of each
        nbytes = max(1, min(int(len(memory) * share / first), _MOST) >> 20) << 20
        memory = BufferPool().take(nbytes).zero_()
        best = dict.fromkeys(candidates, float("inf"))
        # Its blocks are new, which takes longer; on a slow drive there is time for no other.
        best[candidates[0]] = _seconds_of(path, memory, candidates[0], direct_io)
        while time.perf_counter() < end:
            for candidate in candidates:
                taken = _seconds_of(path, memory, candidate, direct_io)
                best[candidate] = min(best[candidate], taken)
                if time.perf_counter() >= end:
                    break
    finally:
        path.unlink(missing_ok=True)
    fastest = min(best, key=lambda candidate: best[candidate])
    if best[candidates[0]] < _BETTER * best[fastest]:
        fastest = candidates[0]
    return IOSettings(*fastest, bandwidth=2 * nbytes / best[fastest])


def _seconds_of(
    path: Path, memory: Tensor, settings: tuple[int, int], direct_io: bool | Literal["auto"]
) -> float:
    """Of a write that is made durable, and a read of the same."""
    threads = Threads(settings[1], settings[0], direct_io)
    file = DirectFile(path, threads)
    try:
        start = time.perf_counter()
        file.write(memory, 0).wait()
        file.sync().wait()
        file.read(memory, 0).wait()
        return time.perf_counter() - start
    finally:
        file.close()
        threads.close()


def _remembered(path: Path) -> dict[str, IOSettings]:
    """What was measured before; nothing if that cannot be read."""
    try:
        listed: dict[str, Any] = json.loads(path.read_text())
        return {key: IOSettings(**values) for key, values in listed.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(path: Path, settings: dict[str, IOSettings]) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps({key: asdict(found) for key, found in settings.items()}))
    unfinished.replace(path)
