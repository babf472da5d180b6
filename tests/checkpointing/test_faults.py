"""What breaks while a run is training: it goes on, and what was complete stays complete."""

import os
import resource
import subprocess
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.exceptions import FSTimeoutError

from lightning_align.checkpointing import (
    SnapshotEngine,
    committed_checkpoints,
    latest_valid_checkpoint,
    load_checkpoint,
)
from tests.helpers.children import in_child
from tests.helpers.faulty_files import FaultyFileSystem, faulty

MB = 1 << 20


@pytest.fixture(autouse=True)
def _no_time_between_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_align.checkpointing.engine._RETRY_S", 0.001)


def state(megabytes: float, value: float = 1.0) -> dict[str, Any]:
    return {"weight": torch.full((int(megabytes * MB / 4),), value)}


def stored(dirpath: Any) -> list[str]:
    return [manifest.name for manifest in committed_checkpoints(dirpath)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[str]:
    """A folder with room for 8 MB: a filesystem of that size where we may mount one.

    Elsewhere a filesystem behind a URL that raises what a full one does.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if mounted:
        try:
            yield str(folder)
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return

    def before(operation: str, name: str) -> None:
        used = sum(len(file.getvalue()) for file in FaultyFileSystem.store.values())
        if operation == "write" and name.endswith(".ckpt") and used > 3 * MB:
            raise OSError(28, "No space left on device")

    with faulty(before):
        yield "faulty://disk"


def test_a_full_disk(small_disk: str) -> None:
    """The second does not fit; what it wrote goes, the first stays, and a smaller one is saved."""
    engine = SnapshotEngine(small_disk)
    engine.save(state(5), "step100", 100)
    assert engine.wait(30)
    engine.save(state(5, 2.0), "step200", 200)
    engine.delete("step100")

    expected = r"'step200' \(step 200\) was not written .*No space left on device.*step 100 \("
    with pytest.warns(UserWarning, match=expected):
        assert engine.wait(30)

    assert stored(small_disk) == ["step100"]
    (error,) = engine.pop_errors()
    assert isinstance(error.error, OSError)
    assert engine.restore(200)["weight"].mean() == 2  # still in memory
    engine.save(state(0.1, 3.0), "step300", 300)
    assert engine.close(30)
    newest = latest_valid_checkpoint(small_disk)
    assert newest is not None
    assert load_checkpoint(newest)["weight"].mean() == 3
    assert stored(small_disk) == ["step300"]


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """The same from another direction, on any machine: the system refuses the write half-way."""
    engine = SnapshotEngine(tmp_path)
    engine.save(state(0.5), "a", 1)
    engine.wait(30)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MB, hard))
    try:
        engine.save(state(3), "b", 2)
        with pytest.warns(UserWarning, match=r"File too large.*Last complete checkpoint: step 1"):
            engine.wait(30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    engine.save(state(3), "b", 3)  # the name is free again
    engine.close()
    assert stored(tmp_path) == ["b", "a"]
    assert not list(tmp_path.glob("*.writing"))


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    """Root may write anywhere, so a process that gives that up."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o777)
    for parent in [folder, *list(folder.parents)[:4]]:
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o055)

    def run() -> None:
        engine = SnapshotEngine(folder)
        engine.save(state(0.1), "a", 1)
        engine.wait(30)
        folder.chmod(0o555)
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        engine.save(state(0.1), "b", 2)
        with pytest.warns(UserWarning, match=r"PermissionError.*Last complete checkpoint: step 1"):
            engine.wait(30)
        assert engine.close(30)

    assert in_child(run) == 0
    assert stored(folder) == ["a"]
    assert {path.name for path in folder.iterdir()} == {
        ".lightning_align.lock",
        "a.ckpt",
        "a.ckpt.json",
    }


@pytest.mark.parametrize("error", [FSTimeoutError(), ConnectionError("reset by peer")])
def test_a_store_that_fails_twice_is_tried_again(error: Exception) -> None:
    failures = iter([error, error])

    def before(operation: str, name: str) -> None:
        if operation == "write" and name == "a.ckpt":
            failure = next(failures, None)
            if failure is not None:
                raise failure

    with faulty(before):
        engine = SnapshotEngine("faulty://run")
        engine.save(state(0.1), "a", 1)
        assert engine.wait(30)
        assert engine.pop_errors() == []
        engine.close()
        assert stored("faulty://run") == ["a"]
        assert latest_valid_checkpoint("faulty://run") is not None


@pytest.mark.parametrize("file", ["b.ckpt.writing", "b.ckpt", "b.ckpt.json"])
def test_a_store_that_stays_away(file: str) -> None:
    def before(operation: str, name: str) -> None:
        if operation == "write" and name == file:
            raise FSTimeoutError

    with faulty(before):
        engine = SnapshotEngine("faulty://run")
        engine.save(state(0.1), "a", 1)
        engine.save(state(0.1), "b", 2)
        engine._writer.wait(timeout_s=30)
        with pytest.warns(UserWarning, match=r"FSTimeoutError.*Last complete checkpoint: step 1"):
            engine.save(state(0.1), "c", 3)
        assert engine.close()
        assert stored("faulty://run") == ["c", "a"]
        assert "b.ckpt" not in engine.folder.names()


def test_a_store_that_hangs_does_not_hold_the_end_of_training() -> None:
    gate = threading.Event()

    def before(operation: str, name: str) -> None:
        if operation == "write" and name == "b.ckpt":
            gate.wait(30)

    with faulty(before):
        engine = SnapshotEngine("faulty://run")
        engine.save(state(0.1), "a", 1)
        engine.save(state(0.1), "b", 2)
        with pytest.warns(
            UserWarning, match="Not written within 0.1 s: b. Last complete .* step 1"
        ):
            assert not engine.close(timeout_s=0.1)
        gate.set()
        assert engine.close(30)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_writer_that_died(tmp_path: Path) -> None:
    def die(_: Any) -> None:
        raise SystemExit

    engine = SnapshotEngine(tmp_path)
    engine.save(state(0.1), "a", 1)
    engine.wait(30)
    write, engine._write = engine._write, die  # type: ignore[method-assign]
    engine.save(state(0.1), "b", 2)
    assert engine._writer._thread is not None
    engine._writer._thread.join(10)
    engine._write = write  # type: ignore[method-assign]

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        engine.save(state(0.1), "c", 3)
        engine.wait(30)

    messages = [str(each.message) for each in warned]
    assert any("thread that writes checkpoints died; it is started again" in m for m in messages)
    assert any("'b' (step 2) was not written" in m and "step 1" in m for m in messages)
    engine.close()
    assert stored(tmp_path) == ["c", "a"]


def test_a_state_that_cannot_be_pickled(tmp_path: Path) -> None:
    engine = SnapshotEngine(tmp_path)
    engine.save({"function": lambda: None}, "a", 1)
    with pytest.warns(UserWarning, match=r"'a' \(step 1\) was not written.*ickl"):
        engine.wait(30)
    assert engine.close()
    assert [path.name for path in tmp_path.iterdir()] == [".lightning_align.lock"]
