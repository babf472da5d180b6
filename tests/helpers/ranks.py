"""Run a function in forked processes that are one gloo group, and get back what each returned."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from torch import distributed


@dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Args:
        exit_code: 0 where the function returned, 1 where it raised, ``-signal`` where the rank was
            killed.
        result: What the function returned.
        error: Traceback of what it raised.
        seconds: From the start of all ranks to its end.
        stuck: Whether it had to be killed here, because it outlived its time.
    """

    exit_code: int
    result: Any
    error: str
    seconds: float
    stuck: bool


def run_ranks(
    fn: Callable[[int], Any],
    world_size: int = 2,
    timeout_s: float = 60.0,
    *,
    group: bool = True,
    grace_s: float = 3.0,
) -> list[Any]:
    """``fn(rank)`` in ``world_size`` forked processes; returns what each returned, by rank.

    Forked, so ``fn`` may be a closure; what it returns is pickled. Call it where no multi-threaded
    backward has run (conftest.py sees to that).

    Args:
        fn: Called with the rank.
        world_size: Number of processes.
        timeout_s: Time for all of it; ranks that are stuck then are killed.
        group: Whether a gloo group of all ranks is there when ``fn`` is called.
        grace_s: Time that the others have once a rank has failed.

    Raises:
        RuntimeError: If a rank raised, was killed or was stuck; with its traceback.
    """
    ended = end_of_ranks(fn, world_size, timeout_s, group=group, grace_s=grace_s)
    failed = [rank for rank, end in enumerate(ended) if end.exit_code != 0]
    # The one that failed by itself first: the others often only lost their peer.
    failed.sort(key=lambda rank: (ended[rank].stuck, ended[rank].seconds))
    if failed:
        told = "\n".join(f"rank {rank}: {ended[rank]}\n{ended[rank].error}" for rank in failed)
        raise RuntimeError(f"{len(failed)} of {world_size} ranks failed\n{told}")
    return [end.result for end in ended]


def end_of_ranks(
    fn: Callable[[int], Any],
    world_size: int = 2,
    timeout_s: float = 60.0,
    *,
    group: bool = True,
    grace_s: float | None = None,
) -> list[Ended]:
    """The same, for ranks that are meant to fail: how each ended.

    Args:
        fn: Called with the rank.
        world_size: Number of processes.
        timeout_s: Ranks that are stuck then are killed.
        group: Whether a gloo group of all ranks is there when ``fn`` is called.
        grace_s: Time that the others have once a rank has failed; None gives them all of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        pids = [
            _fork(fn, rank, world_size, Path(folder), timeout_s if group else None)
            for rank in range(world_size)
        ]
        deadline = start + timeout_s
        ended: dict[int, Ended] = {}
        while len(ended) < world_size:
            for rank in set(range(world_size)) - ended.keys():
                stuck = time.monotonic() > deadline
                if stuck:
                    os.kill(pids[rank], signal.SIGKILL)
                pid, status = os.waitpid(pids[rank], 0 if stuck else os.WNOHANG)
                if pid == 0:
                    continue
                code = os.waitstatus_to_exitcode(status)
                result, error = _read(Path(folder) / str(rank))
                ended[rank] = Ended(code, result, error, time.monotonic() - start, stuck)
                if code != 0 and grace_s is not None:
                    deadline = min(deadline, time.monotonic() + grace_s)
            time.sleep(0.01)
    return [ended[rank] for rank in range(world_size)]


def _fork(
    fn: Callable[[int], Any], rank: int, world_size: int, folder: Path, timeout_s: float | None
) -> int:
    pid = os.fork()
    if pid:
        return pid
    code, outcome = 1, (None, "")
    try:
        torch.set_num_threads(1)
        if timeout_s is not None:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s),
            )
        outcome = (fn(rank), "")
        if distributed.is_initialized():
            distributed.barrier()  # whoever leaves early looks like a failure to the others
        code = 0
    except BaseException:
        outcome = (None, traceback.format_exc())
    try:
        (folder / str(rank)).write_bytes(pickle.dumps(outcome))
    except Exception:
        (folder / str(rank)).write_bytes(pickle.dumps((None, traceback.format_exc())))
        code = 1
    os._exit(code)  # without pytest's own end


def _read(path: Path) -> tuple[Any, str]:
    return pickle.loads(path.read_bytes()) if path.exists() else (None, "")


class ForkedRanks(ClusterEnvironment):
    """Tells a Trainer inside of ``run_ranks`` that the processes are there already.

    Example:
        >>> Trainer(devices=2, plugins=[ForkedRanks(rank, 2)], strategy=...)
    """

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self._rank, self._world_size = rank, world_size

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        return 0  # the group is there already

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self._rank

    def node_rank(self) -> int:
        return 0
