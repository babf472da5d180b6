import atexit
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align.checkpointing import (
    Commit,
    SnapshotEngine,
    committed_checkpoints,
    latest_valid_checkpoint,
    load_checkpoint,
)
from lightning_align.mapped import Part, mapped, part_of, source_of
from tests.helpers.children import in_child
from tests.helpers.faulty_files import FaultyFileSystem, Gate, faulty

URL = "faulty://run"


@pytest.fixture(autouse=True)
def _no_time_between_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_align.checkpointing.engine._RETRY_S", 0.001)


def state(value: float) -> dict[str, Any]:
    return {"weight": torch.full((4, 5), float(value)), "step": int(value)}


def stored(dirpath: Any) -> list[str]:
    return [manifest.name for manifest in committed_checkpoints(dirpath)]


@pytest.fixture
def gate() -> Iterator[Gate]:
    held = Gate()
    with faulty(held):
        yield held
        held.opened.set()


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    commits: list[Commit] = []
    engine = SnapshotEngine(tmp_path, on_commit=commits.append)

    result = engine.save(state(7), "step7", 7, {"val_loss": 0.5})

    assert engine.load("step7")["weight"].mean() == 7
    assert result.copied_bytes == 80
    assert 0 <= result.waited_s <= result.stall_s
    assert not result.skipped
    assert [commit.path for commit in commits] == [str(tmp_path / "step7.ckpt")]
    assert commits[0].manifest == committed_checkpoints(tmp_path)[0] == engine.committed[0]
    lineage = {"commit": 1, "parent": None, "abandoned": []}
    assert commits[0].manifest.metadata == {"val_loss": 0.5, "lineage": lineage}
    assert commits[0].persist_s > 0
    assert engine.close()
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lightning_align.lock",
        "step7.ckpt",
        "step7.ckpt.json",
    }


def test_it_is_not_durable_before_its_manifest(gate: Gate) -> None:
    engine = SnapshotEngine(URL)
    engine.save(state(1), "a", 1)
    assert gate.reached.wait(10)

    assert stored(URL) == []
    assert not engine.wait(0.05)
    gate.opened.set()
    assert engine.wait(10)
    assert stored(URL) == ["a"]
    engine.close()


def test_training_goes_on_while_it_is_written(gate: Gate) -> None:
    engine = SnapshotEngine(URL)
    training = state(1)
    engine.save(training, "a", 1)
    training["weight"].zero_()
    gate.opened.set()

    assert engine.load("a")["weight"].mean() == 1
    engine.close()


def test_wait_waits_for_the_buffer(gate: Gate) -> None:
    engine = SnapshotEngine(URL, wait_timeout_s=0.1)
    engine.save(state(1), "a", 1)

    with pytest.warns(
        UserWarning, match="A save was skipped: TimeoutError: earlier saves were not"
    ):
        late = engine.save(state(2), "b", 2)

    assert late.skipped
    assert late.waited_s >= 0.1
    gate.opened.set()
    engine.wait(10)
    assert not engine.save(state(3), "c", 3).skipped
    engine.close()
    assert stored(URL) == ["c", "a"]


def test_skip_skips(gate: Gate) -> None:
    engine = SnapshotEngine(URL, backpressure="skip")
    assert not engine.save(state(1), "a", 1).skipped
    result = engine.save(state(2), "b", 2)

    assert result.skipped
    assert result.copied_bytes == 0
    assert engine.steps == [1]
    gate.opened.set()
    engine.wait(10)
    assert not engine.save(state(3), "b", 3).skipped
    engine.close()
    assert stored(URL) == ["b", "a"]


def test_latest_keeps_the_latest_of_those_that_wait(gate: Gate) -> None:
    engine = SnapshotEngine(URL, backpressure="latest")
    engine.save(state(1), "a", 1)
    assert gate.reached.wait(10)
    results = [engine.save(state(step), f"save{step}", step) for step in (2, 3, 4)]

    assert [result.replaced for result in results] == [(), ("save2",), ("save3",)]
    assert not any(result.skipped for result in results)
    gate.opened.set()
    engine.close()
    assert stored(URL) == ["save4", "a"]
    assert load_checkpoint(f"{URL}/save4.ckpt")["weight"].mean() == 4
    assert load_checkpoint(f"{URL}/a.ckpt")["weight"].mean() == 1


def test_the_last_snapshots_stay_in_memory(tmp_path: Path) -> None:
    engine = SnapshotEngine(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        engine.save(state(step), f"step{step}", step)

    assert engine.steps == [3, 2]
    assert engine.restore(2)["weight"].mean() == 2
    assert engine.restore(3)["step"] == 3
    with pytest.raises(ValueError, match=r"restore\(step=1\): steps in memory: \[3, 2\]"):
        engine.restore(1)
    engine.close()


def test_in_memory_only(tmp_path: Path) -> None:
    engine = SnapshotEngine(tmp_path / "none", persist=False)
    engine.save(state(1), "a", 1)
    engine.delete("a")

    assert engine.restore(1)["weight"].mean() == 1
    assert engine.close()
    assert not (tmp_path / "none").exists()


def test_later_snapshots_are_forgotten_and_their_steps_can_be_saved_again() -> None:
    engine = SnapshotEngine(persist=False, keep_last=3)
    for step in (1, 2, 3):
        engine.save(state(step), f"step{step}", step)
    engine.forget(after=1)
    assert engine.steps == [1]
    for step in (2, 3):
        engine.save(state(10 * step), f"again{step}", step)
    assert engine.steps == [3, 2, 1]
    assert [engine.restore(step)["step"] for step in (1, 2, 3)] == [1, 20, 30]


def test_what_a_file_shows_is_shown_again_and_let_go_when_it_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 16)
    ended: list[bool] = []
    with (tmp_path / "file").open("rb") as file:
        whole = mapped([Part(file.fileno(), 0, 4096)], "file", lambda: ended.append(True))
    shown = part_of(whole, 256, (64,), torch.float32)
    engine = SnapshotEngine(persist=False, keep_last=2)
    engine.save({"shown": shown, "own": torch.ones(3)}, "a", 1)
    del whole, shown
    found = engine.restore(1)
    assert source_of(found["shown"]) == ("file", 256)
    assert source_of(found["own"]) is None
    assert bytes(found["shown"].numpy().data) == bytes(range(256))
    engine.forget(after=0)
    assert not ended
    del found
    assert ended


def test_a_deletion_waits_for_the_save_before_it(gate: Gate) -> None:
    gate.opened.set()
    engine = SnapshotEngine(URL)
    engine.save(state(1), "old", 1)
    engine.wait()
    gate.opened.clear()
    engine.save(state(2), "new", 2)
    engine.delete("old")
    assert not engine.wait(0.05)
    assert stored(URL) == ["old"]
    gate.opened.set()
    engine.close()
    assert stored(URL) == ["new"]
    names = [name for operation, name in FaultyFileSystem.log if operation == "delete"]
    assert names.index("old.ckpt.json") < names.index("old.ckpt")


def test_a_deletion_does_not_happen_if_that_save_fails() -> None:
    full = True

    def before(operation: str, name: str) -> None:
        if full and operation == "write" and name == "new.ckpt":
            raise OSError(28, "No space left on device")

    with faulty(before):
        engine = SnapshotEngine(URL)
        engine.save(state(1), "old", 1)
        engine.save(state(2), "new", 2)
        engine.delete("old")
        with pytest.warns(UserWarning, match="Last complete checkpoint: step 1"):
            assert engine.wait(30)
        assert stored(URL) == ["old"]

        full = False
        engine.save(state(3), "newer", 3)
        engine.close()
        assert stored(URL) == ["newer"]  # the deletion was not forgotten


def test_a_deletion_does_not_rely_on_a_save_that_was_replaced(gate: Gate) -> None:
    """a is being written, b waits to replace it, c takes the place of b: a must stay until c is."""
    engine = SnapshotEngine(URL, backpressure="latest")
    engine.save(state(1), "a", 1)
    assert gate.reached.wait(10)
    engine.save(state(2), "b", 2)
    engine.delete("a")
    engine.save(state(3), "c", 3)

    def after_a(operation: str, name: str) -> None:
        if operation == "write" and name == "c.ckpt":
            raise PermissionError("denied")

    FaultyFileSystem.before = staticmethod(after_a)
    gate.opened.set()
    with pytest.warns(UserWarning, match="'c'.*Last complete checkpoint: step 1"):
        engine.close()
    assert stored(URL) == ["a"]


def test_a_name_is_never_overwritten(tmp_path: Path) -> None:
    engine = SnapshotEngine(tmp_path)
    engine.save(state(1), "a", 1)
    with pytest.raises(
        ValueError, match=r"save\(name='a'\).*none is ever overwritten. Use another"
    ):
        engine.save(state(2), "a", 2)
    engine.close()

    again = SnapshotEngine(tmp_path)
    assert [manifest.name for manifest in again.committed] == ["a"]
    with pytest.raises(ValueError, match="none is ever overwritten"):
        again.save(state(2), "a", 2)
    again.close()


def test_a_file_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    """ModelCheckpoint's files have no manifests; nor has a checkpoint whose manifest is damaged."""
    foreign = tmp_path / "epoch=1.ckpt"
    foreign.write_bytes(b"theirs")
    (tmp_path / "linked.ckpt").symlink_to(foreign)
    engine = SnapshotEngine(tmp_path)
    for name in ("epoch=1", "linked"):
        with pytest.raises(ValueError, match="none is ever overwritten"):
            engine.save(state(1), name, 1)
    engine.save(state(1), "epoch=2", 1)
    engine.close()
    assert foreign.read_bytes() == b"theirs"


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a.ckpt"])
def test_a_name_must_be_one(tmp_path: Path, name: str) -> None:
    engine = SnapshotEngine(tmp_path)
    with pytest.raises(ValueError, match="must be a file name, without folder and extension"):
        engine.save(state(1), name, 1)
    engine.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_last": 0}, r"SnapshotEngine\(keep_last=0\): must be at least 1"),
        ({"backpressure": "drop"}, r"backpressure='drop'\): must be 'wait', 'skip' or 'latest'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SnapshotEngine(**{"dirpath": tmp_path, **arguments})


def test_metadata_must_be_plain(tmp_path: Path) -> None:
    engine = SnapshotEngine(tmp_path)
    with pytest.raises(ValueError, match=r"metadata=.*: must be plain values"):
        engine.save(state(1), "a", 1, {"loss": torch.ones(1)})
    assert engine.committed == []
    engine.close()


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    engine = SnapshotEngine(tmp_path)
    assert engine.close()
    assert engine.close()
    with pytest.raises(RuntimeError, match=r"save\(name='a'\): it was closed"):
        engine.save(state(1), "a", 1)


def test_closing_keeps_the_deadline(gate: Gate) -> None:
    engine = SnapshotEngine(URL)
    engine.save(state(1), "a", 1)
    with pytest.warns(
        UserWarning, match="Not written within 0.1 s: a. No complete checkpoint is in"
    ):
        assert not engine.close(0.1)
    gate.opened.set()
    assert engine.close()
    assert stored(URL) == ["a"]


def test_on_commit_that_raises_is_told_of_and_changes_nothing(tmp_path: Path) -> None:
    def on_commit(_: Commit) -> None:
        raise KeyError("mine")

    engine = SnapshotEngine(tmp_path, on_commit=on_commit)
    engine.save(state(1), "a", 1)
    with pytest.warns(UserWarning, match="on_commit raised: KeyError: 'mine'"):
        engine.wait()
    engine.close()
    assert stored(tmp_path) == ["a"]


def test_errors_that_are_taken_are_not_warned_of() -> None:
    def before(operation: str, name: str) -> None:
        if name == "a.ckpt" and operation == "write":
            raise PermissionError(13, "denied")

    with faulty(before), warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = SnapshotEngine(URL)
        engine.save(state(1), "a", 1)
        engine._writer.wait(timeout_s=30)
        (error,) = engine.pop_errors()
        assert (error.name, error.step) == ("a", 1)
        assert isinstance(error.error, PermissionError)
        assert engine.pop_errors() == []
        engine.save(state(2), "b", 2)
        engine.close()


@pytest.mark.parametrize("url", ["memory://engine_test", "faulty://engine_test"])
def test_object_stores(url: str) -> None:
    """Nothing is renamed: a filesystem without it will do."""
    with faulty():
        engine = SnapshotEngine(url, storage_options={"token": "x"} if "faulty" in url else None)
        for step in (1, 2):
            engine.save(state(step), f"step{step}", step)
        engine.delete("step1")
        assert engine.load("step2")["step"] == 2
        assert engine.close()

        newest = latest_valid_checkpoint(url)
        assert newest is not None
        assert newest.startswith(url.split("/")[0])
        assert newest.endswith("/engine_test/step2.ckpt")
        assert load_checkpoint(newest)["weight"].mean() == 2
        if "faulty" in url:
            assert FaultyFileSystem.options == {"token": "x"}


def test_saving_at_the_end_of_the_process(tmp_path: Path) -> None:
    """Nobody closed the engine: what was saved is written before the interpreter ends."""

    def run() -> None:
        atexit._clear()  # others delete the folders of the process that this one is a fork of
        engine = SnapshotEngine(tmp_path)
        engine.save({"weight": torch.ones(2_000_000)}, "a", 1)
        atexit._run_exitfuncs()

    assert in_child(run) == 0
    assert stored(tmp_path) == ["a"]


def test_an_engine_belongs_to_one_process(tmp_path: Path) -> None:
    engine = SnapshotEngine(tmp_path)

    def run() -> None:
        with pytest.raises(RuntimeError, match="it belongs to the parent of this process"):
            engine.save(state(1), "a", 1)
        assert engine.close()

    assert in_child(run) == 0
    engine.save(state(1), "a", 1)  # the lock is still ours
    engine.close()
    assert stored(tmp_path) == ["a"]


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be synced there")
def test_all_is_durable_before_the_manifest_and_the_manifest_before_on_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a machine that loses power has on disk is what was synced."""
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", note)
    at_commit: list[list[str]] = []
    with SnapshotEngine(tmp_path, on_commit=lambda _: at_commit.append(list(synced))) as engine:
        synced.clear()
        engine.save(state(1), "a", 1)

    folder = tmp_path.name
    assert at_commit == [["a.ckpt.writing", "a.ckpt", folder, "a.ckpt.json", folder]]
