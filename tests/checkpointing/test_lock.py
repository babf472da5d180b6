import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from lightning_align.checkpointing import SnapshotEngine, lock
from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.lock import LOCK_FILE, FolderLock
from tests.helpers.children import fork
from tests.helpers.faulty_files import faulty

URL = "faulty://locked"


@pytest.fixture(autouse=True)
def _quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)


def held_elsewhere(path: Path) -> int:
    """A process that holds the folder until it is killed."""
    reader, writer = os.pipe()

    def run() -> None:
        SnapshotEngine(path)
        os.write(writer, b"x")
        time.sleep(60)

    pid = fork(run)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    return pid


def test_two_engines_of_one_process(tmp_path: Path) -> None:
    first = SnapshotEngine(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"another engine of this process \(pid \d+\) is writing"
    ):
        SnapshotEngine(tmp_path)
    first.close()
    SnapshotEngine(tmp_path).close()


def test_two_runs_until_the_first_is_killed(tmp_path: Path) -> None:
    pid = held_elsewhere(tmp_path)
    try:
        owner = (
            rf"another run \(host {socket.gethostname()}, pid {pid}\) is writing checkpoints there"
        )
        with pytest.raises(RuntimeError, match=owner + ". Give each run a folder of its own"):
            SnapshotEngine(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    SnapshotEngine(tmp_path).close()  # the lock died with it


def test_a_worker_that_outlives_the_run_does_not_hold_the_folder(tmp_path: Path) -> None:
    """A DataLoader's worker is a fork of the run, with its open files."""
    reader, writer = os.pipe()

    def run() -> None:
        SnapshotEngine(tmp_path)
        worker = fork(lambda: time.sleep(60))
        os.write(writer, worker.to_bytes(4, "little"))

    os.waitpid(fork(run), 0)
    worker = int.from_bytes(os.read(reader, 4), "little")
    os.close(reader)
    os.close(writer)
    try:
        os.kill(worker, 0)
        SnapshotEngine(tmp_path).close()
    finally:
        os.kill(worker, signal.SIGKILL)


def owner_of(url: str) -> dict[str, object]:
    owner: dict[str, object] = json.loads(Folder(url).read(LOCK_FILE))
    return owner


def write_owner(**owner: object) -> None:
    Folder(URL).write(LOCK_FILE, [json.dumps(owner).encode()])


def test_behind_a_url_a_dead_owner_is_taken_over_from() -> None:
    pid = fork(lambda: None)
    os.waitpid(pid, 0)
    with faulty():
        write_owner(host=socket.gethostname(), pid=pid, started="1", beat=0)
        with pytest.warns(UserWarning, match=rf"taking over the lock of another run .*pid {pid}\)"):
            engine = SnapshotEngine(URL)
        assert owner_of(URL)["pid"] == os.getpid()
        engine.close()
        assert LOCK_FILE not in Folder(URL).names()


def test_behind_a_url_a_living_owner_is_not() -> None:
    pid = fork(lambda: time.sleep(60))
    try:
        with faulty():
            started = lock._started(pid)
            write_owner(host=socket.gethostname(), pid=pid, started=started, beat=0)
            with pytest.raises(RuntimeError, match=rf"pid {pid}\) is writing checkpoints there"):
                SnapshotEngine(URL)
            # The same number given to another process since:
            write_owner(host=socket.gethostname(), pid=pid, started="1", beat=0)
            with pytest.warns(UserWarning, match="taking over"):
                SnapshotEngine(URL).close()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_an_owner_on_another_host_is_dead_when_it_stops_counting() -> None:
    with faulty():
        write_owner(host="elsewhere", pid=1, started=None, beat=7)
        with pytest.warns(UserWarning, match=r"taking over .*host elsewhere, pid 1"):
            SnapshotEngine(URL).close()


def test_an_owner_on_another_host_that_counts_is_alive() -> None:
    reads = 0

    def before(operation: str, name: str) -> None:
        nonlocal reads
        if operation == "read" and name == LOCK_FILE:
            reads += 1
            if reads == 2:
                write_owner(host="elsewhere", pid=1, started=None, beat=8)

    with faulty(before):
        write_owner(host="elsewhere", pid=1, started=None, beat=7)
        with pytest.raises(RuntimeError, match="host elsewhere, pid 1"):
            SnapshotEngine(URL)


def test_a_run_whose_folder_was_taken_over_stops_writing() -> None:
    with faulty():
        engine = SnapshotEngine(URL)
        write_owner(host="elsewhere", pid=1, started=None, beat=0)
        deadline = time.monotonic() + 10
        while not engine._lock.taken_over_by and time.monotonic() < deadline:
            time.sleep(0.01)
        engine.save({"weight": torch.ones(2)}, "a", 1)
        with pytest.warns(UserWarning, match=r"host elsewhere, pid 1\) has taken over the folder"):
            engine.close()
        assert "a.ckpt" not in Folder(URL).names()
        assert owner_of(URL)["host"] == "elsewhere"


def test_an_owner_counts() -> None:
    with faulty():
        held = FolderLock(Folder(URL))
        held.acquire()
        before = owner_of(URL)["beat"]
        time.sleep(0.5)
        assert owner_of(URL)["beat"] > before  # type: ignore[operator]
        held.release()
