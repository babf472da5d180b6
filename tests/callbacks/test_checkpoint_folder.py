"""The folder of AsyncCheckpoint: names, retention behind commits, and what training hears of it."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from lightning_align.callbacks.checkpoint_folder import (
    SAVES,
    CheckpointFolder,
    order_in_run,
    path_in,
)
from lightning_align.checkpointing import committed_checkpoints
from lightning_align.checkpointing.manifest import Manifest
from lightning_align.checkpointing.retention import Retention
from tests.helpers.faulty_files import Gate, faulty

URL = "faulty://folder_test"


@pytest.fixture(autouse=True)
def _no_time_between_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_align.checkpointing.engine._RETRY_S", 0.001)


@pytest.fixture
def gate() -> Iterator[Gate]:
    held = Gate()
    with faulty(held):
        yield held
        held.opened.set()


def folder_of(
    dirpath: Any,
    retention: Retention | None = None,
    backpressure: Literal["wait", "skip", "latest"] = "wait",
    on_change: Any = lambda: None,
    others: Any = (),
) -> CheckpointFolder:
    return CheckpointFolder(
        str(dirpath),
        retention or Retention(-1, "min", keep_newest=True),
        backpressure=backpressure,
        storage_options=None,
        on_change=on_change,
        others=others,
    )


def save(folder: CheckpointFolder, step: int, score: float | None = None, run: str = "a") -> Any:
    folder._retention.begin(f"step{step}", score)
    return folder.save({"weight": torch.ones(2)}, f"step{step}", step, {"run": run})


def stored(dirpath: Any) -> list[str]:
    return [manifest.name for manifest in committed_checkpoints(str(dirpath))]


def test_commits_are_told_once_each_in_order(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    assert folder.new_commits() == []
    save(folder, 1)
    save(folder, 2)
    folder.wait(10)
    commits = folder.new_commits()
    assert [commit.manifest.name for commit in commits] == ["step1", "step2"]
    assert commits[0].path == path_in(str(tmp_path), "step1", None)
    assert folder.new_commits() == []
    assert (folder.num_saved, folder.num_failed) == (2, 0)
    folder.close(10)


def test_the_best_are_kept_and_the_change_is_told_before_anything_is_deleted(
    tmp_path: Path,
) -> None:
    there: list[set[str]] = []
    retention = Retention(1, "min", keep_newest=False)
    folder = folder_of(tmp_path, retention, on_change=lambda: there.append({*stored(tmp_path)}))
    for step, score in ((1, 3.0), (2, 1.0)):
        save(folder, step, score)
        folder.wait(10)
    folder.close(10)
    assert there == [{"step1"}, {"step1", "step2"}]
    assert stored(tmp_path) == ["step2"]
    assert retention.ranked == {"step2": 1.0}


def test_what_was_asked_to_go_goes(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    save(folder, 1)
    save(folder, 2)
    folder.delete(["step1"])
    folder.close(10)
    assert stored(tmp_path) == ["step2"]


def test_others_go_with_the_first_commit_and_no_sooner(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    save(folder, 4, run="first")
    folder.close(10)
    folder = folder_of(tmp_path, others=["step4"])
    folder.wait(10)
    assert stored(tmp_path) == ["step4"]
    save(folder, 1, run="second")
    folder.close(10)
    assert stored(tmp_path) == ["step1"]


def test_going_back_abandons_nothing_of_another_run(tmp_path: Path) -> None:
    """As ``overwrite`` leaves one there until the first commit."""
    folder = folder_of(tmp_path, Retention(1, "max", keep_newest=False))
    save(folder, 4, 4.0, run="first")
    folder.close(10)
    folder = folder_of(tmp_path, Retention(1, "max", keep_newest=False))
    folder.continue_from("elsewhere/step2.ckpt", 2, "second")
    save(folder, 6, 6.0, run="second")
    folder.close(10)
    assert set(stored(tmp_path)) == {"step4", "step6"}


def test_a_name_is_free_if_no_file_has_it_and_nobody_was_given_it(tmp_path: Path) -> None:
    for name in ("a.ckpt", "a-v3.ckpt", "b"):
        (tmp_path / name).touch()

    def formatted(version: int | None) -> str:
        return "a" if version is None else f"a-v{version}"

    folder = folder_of(tmp_path)
    assert [folder.free_name(formatted, 2) for _ in range(2)] == ["a-v2", "a-v4"]
    assert folder.free_name(lambda _: "new", 1) == "new"
    folder.close(10)


def test_a_save_that_was_skipped_is_no_rival_any_more(gate: Gate) -> None:
    retention = Retention(1, "min", keep_newest=False)
    folder = folder_of(URL, retention, "skip")
    save(folder, 1, 2.0)
    assert save(folder, 2, 1.0).skipped
    assert retention.admits(1.5)
    gate.opened.set()
    folder.close(10)
    assert stored(URL) == ["step1"]


def test_a_save_that_was_replaced_is_no_rival_any_more(gate: Gate) -> None:
    retention = Retention(1, "min", keep_newest=False)
    folder = folder_of(URL, retention, "latest")
    save(folder, 1, 3.0)
    assert gate.reached.wait(10)
    save(folder, 2, 1.0)
    assert save(folder, 3, 2.0).replaced == ("step2",)
    assert retention.admits(1.5)
    gate.opened.set()
    folder.close(10)
    assert stored(URL) == ["step3"]


def test_what_will_be_replaced_is_no_rival_before_the_save(gate: Gate) -> None:
    """The state that is saved says what will be stored, and that one will not."""
    retention = Retention(1, "min", keep_newest=False)
    folder = folder_of(URL, retention, "latest")
    save(folder, 1, 3.0)
    assert gate.reached.wait(10)
    save(folder, 2, 1.0)
    assert retention.expected().newest == "step2"
    folder.make_room()
    assert retention.expected().newest == "step1"
    assert save(folder, 3, 2.0).replaced == ()
    gate.opened.set()
    folder.close(10)
    assert stored(URL) == ["step3"]


def test_a_failure_is_told_once_counted_and_no_rival_any_more() -> None:
    def before(operation: str, name: str) -> None:
        if name == "step1.ckpt" and operation == "write":
            raise PermissionError("denied")

    retention = Retention(1, "min", keep_newest=False)
    with faulty(before), warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = folder_of(URL, retention)
        save(folder, 1, 1.0)
        folder.wait(10)  # without a warning: the caller tells of it
        assert not retention.admits(2.0)
        [error] = folder.new_errors()
        assert (error.name, error.step) == ("step1", 1)
        assert folder.new_errors() == []
        assert retention.admits(2.0)
        assert (folder.num_saved, folder.num_failed) == (1, 1)
        folder.close(10)


def test_a_checkpoint_has_a_path_or_a_url(tmp_path: Path) -> None:
    assert path_in(str(tmp_path), "a", None) == str(tmp_path / "a.ckpt")
    assert path_in("memory://run/", "a", {}) == "memory:///run/a.ckpt"


def test_checkpoints_of_several_folders_are_ordered_by_the_saves_of_their_run() -> None:
    first, second, old = (
        Manifest(name, step, (), {SAVES: saves} if saves else {}, saved_at)
        for name, step, saves, saved_at in (
            ("a", 9, 1, 30.0),
            ("b", 3, 2, 10.0),
            ("c", 12, 0, 99.0),
        )
    )
    assert sorted((second, first, old), key=order_in_run) == [old, first, second]
