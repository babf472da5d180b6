import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align.checkpointing import (
    SnapshotEngine,
    committed_checkpoints,
    latest_valid_checkpoint,
    lock,
)
from lightning_align.checkpointing.commit import sweep
from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.lock import LOCK_FILE, FolderLock
from tests.helpers.children import fork, in_child
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


def test_a_beat_that_is_under_way_does_not_outlive_the_lock() -> None:
    held, beating = FolderLock(Folder(URL)), threading.Event()

    def before(operation: str, name: str) -> None:
        if held.method and operation == "write" and name == LOCK_FILE:
            beating.set()
            time.sleep(0.1)

    with faulty(before):
        held.acquire()
        assert beating.wait(10)
        held.release()
        held._beats.join(10)
        assert LOCK_FILE not in Folder(URL).names()


# What flock is asked for


def is_refused(path: Path) -> bool:
    """Whether another process is refused the folder."""

    def run() -> None:
        with pytest.raises(RuntimeError, match="is writing checkpoints there"):
            SnapshotEngine(path)

    return in_child(run) == 0


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_reading_the_files_of_the_folder_does_not_unlock_it(
    run_folder: Path, tmp_path: Path
) -> None:
    """The lock of lockf goes when any descriptor of the file is closed: by a copy, an upload."""
    engine = SnapshotEngine(run_folder)
    shutil.copytree(run_folder, tmp_path / "copy")
    (run_folder / LOCK_FILE).read_bytes()
    assert is_refused(run_folder)
    engine.close()
    assert not is_refused(run_folder)


def test_a_link_to_the_folder_is_the_folder(run_folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(run_folder)
    engine = SnapshotEngine(run_folder)
    with pytest.raises(RuntimeError, match=r"link'\): another engine of this process"):
        SnapshotEngine(link)
    assert is_refused(link)
    engine.close()
    through_link = SnapshotEngine(link)
    assert is_refused(run_folder)
    through_link.close()


@pytest.mark.parametrize("content", [b"", b"[" * 4096, b'{"host": [1]}', b"\xff"])
def test_a_lock_is_a_lock_whatever_the_file_says(content: bytes, run_folder: Path) -> None:
    engine = SnapshotEngine(run_folder)
    (run_folder / LOCK_FILE).write_bytes(content)
    assert is_refused(run_folder)
    engine.close()


def test_a_forked_child_closes_the_file_and_unlocks_nothing(run_folder: Path) -> None:
    engine = SnapshotEngine(run_folder)

    def run() -> None:
        file = (run_folder / LOCK_FILE).stat()
        for descriptor in range(1024):
            with contextlib.suppress(OSError):
                assert not os.path.samestat(os.fstat(descriptor), file)
        assert engine.close()
        engine._lock.release()

    assert in_child(run) == 0
    assert is_refused(run_folder)
    engine.close()


class Endless(torch.utils.data.Dataset[int]):
    def __init__(self, report: int) -> None:
        self.report = report

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        os.write(self.report, os.getpid().to_bytes(4, "little"))
        time.sleep(60)
        return index


def read_by_workers(report: int) -> None:
    next(iter(torch.utils.data.DataLoader(Endless(report), num_workers=2)))


def start_a_program(report: int) -> None:
    """One that inherits all it may."""
    program = subprocess.Popen(["sleep", "60"], close_fds=False)
    for _ in range(2):
        os.write(report, program.pid.to_bytes(4, "little"))
    time.sleep(60)


@pytest.mark.parametrize("start", [read_by_workers, start_a_program])
def test_the_folder_of_a_killed_run_is_free_while_its_workers_live(
    run_folder: Path, start: Any
) -> None:
    """They outlive it by seconds, or for good; what the run had half written is swept."""
    reader, writer = os.pipe()

    def run() -> None:
        engine = SnapshotEngine(run_folder)
        engine.save({"weight": torch.ones(2)}, "a", 1)
        engine.wait()
        (run_folder / "b.ckpt.writing").touch()
        (run_folder / "b.ckpt").write_bytes(b"half")
        start(writer)

    pid = fork(run)
    os.close(writer)
    workers = {int.from_bytes(os.read(reader, 4), "little") for _ in range(2)}
    os.close(reader)
    try:
        assert is_refused(run_folder)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        engine = SnapshotEngine(run_folder)
        assert [found.name for found in engine.committed] == ["a"]
        assert not (run_folder / "b.ckpt").exists()
        for worker in workers:
            os.kill(worker, 0)
        assert is_refused(run_folder)
        engine.close()
    finally:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def test_a_run_whose_folder_is_deleted_locks_it_again_or_stops_writing(run_folder: Path) -> None:
    """It holds the lock of a file that is gone; whoever comes next would see none."""
    engine = SnapshotEngine(run_folder)
    (run_folder / LOCK_FILE).unlink()
    engine.save({"weight": torch.ones(2)}, "a", 1)
    engine.wait()
    assert is_refused(run_folder)

    shutil.rmtree(run_folder)
    pid = held_elsewhere(run_folder)
    try:
        engine.save({"weight": torch.ones(2)}, "b", 2)
        with pytest.warns(UserWarning, match=rf"'b'.*not written.*pid {pid}\) is writing"):
            engine.close()
        assert not (run_folder / "b.ckpt").exists()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_filesystem_that_refuses_flock(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """NFS without its lock daemon, Lustre without -o flock: an owner counts, as behind a URL."""

    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    message = rf"cannot be locked \(.*{os.strerror(code)}\). In the place of a lock its owner"
    with pytest.warns(UserWarning, match=message):
        engine = SnapshotEngine(run_folder)
    assert engine._lock.method == "beats"
    with pytest.raises(RuntimeError, match="another engine of this process"):
        SnapshotEngine(run_folder)
    assert is_refused(run_folder)
    engine.save({"weight": torch.ones(2)}, "a", 1)
    engine.close()
    assert {path.name for path in run_folder.iterdir()} == {"a.ckpt", "a.ckpt.json"}


def test_flock_is_what_is_used_where_there_is_one(run_folder: Path) -> None:
    engine = SnapshotEngine(run_folder)
    assert engine._lock.method == "flock"
    engine.close()


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"host": 3, "pid": "x"}', b"[" * 5000])
def test_an_owners_file_that_is_damaged_is_an_owner_that_does_not_count(content: bytes) -> None:
    with faulty():
        Folder(URL).write(LOCK_FILE, [content])
        with pytest.warns(UserWarning, match="taking over the lock of another run"):
            SnapshotEngine(URL).close()


# Before the commit


def test_a_checkpoint_whose_file_is_swept_before_its_manifest_is_not_committed(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process that does not know of the lock; the one before stays, though it was to go."""
    sync, swept = Folder.sync, []

    def sync_and_be_swept(folder: Folder) -> None:
        sync(folder)
        if (run_folder / "b.ckpt").exists() and not (run_folder / "b.ckpt.json").exists():
            swept.append(in_child(lambda: sweep(Folder(run_folder))))

    engine = SnapshotEngine(run_folder)
    engine.save({"weight": torch.ones(2)}, "a", 1)
    engine.wait()
    monkeypatch.setattr(Folder, "sync", sync_and_be_swept)
    engine.save({"weight": torch.ones(2)}, "b", 2)
    engine.delete("a")
    with pytest.warns(UserWarning, match=r"'b' .*not written.*b.ckpt is missing.*step 1 \("):
        engine.close()
    assert swept == [0]
    assert [found.name for found in committed_checkpoints(run_folder)] == ["a"]
    assert latest_valid_checkpoint(run_folder) == str(run_folder / "a.ckpt")
