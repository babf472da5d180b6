"""Which checkpoint is the newest, where a run went back and took another way."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.checkpointing import (
    Manifest,
    SnapshotEngine,
    committed_checkpoints,
    latest_valid_checkpoint,
)
from lightning_align.checkpointing.manifest import StoredFile, newest_first


def train(engine: SnapshotEngine, *steps: int, suffix: str = "") -> None:
    for step in steps:
        engine.save({"weight": torch.full((9,), float(step))}, f"step{step}{suffix}", step)


def stored(dirpath: Any) -> list[str]:
    return [manifest.name for manifest in committed_checkpoints(dirpath)]


def went_back(folder: Path) -> None:
    """Trained to 100, again from 40 to 60."""
    with SnapshotEngine(folder) as engine:
        train(engine, 20, 40, 60, 80, 100)
    with SnapshotEngine(folder) as engine:
        left = engine.continue_from("step40", 40)
        assert {found.name for found in left} == {"step60", "step80", "step100"}
        train(engine, 50, 60, suffix="-v1")


def test_the_newest_commit_is_the_latest_whatever_its_step(tmp_path: Path) -> None:
    went_back(tmp_path)
    assert latest_valid_checkpoint(tmp_path) == str(tmp_path / "step60-v1.ckpt")
    assert stored(tmp_path) == [
        *("step60-v1", "step50-v1", "step40", "step20"),
        *("step100", "step80", "step60"),  # left behind: after all of the branch
    ]
    with SnapshotEngine(tmp_path) as engine:
        assert [found.name for found in engine.committed] == stored(tmp_path)


def test_until_the_branch_commits_the_latest_is_the_old_one(tmp_path: Path) -> None:
    with SnapshotEngine(tmp_path) as engine:
        train(engine, 40, 100)
    with SnapshotEngine(tmp_path) as engine:
        engine.continue_from("step40", 40)
        assert latest_valid_checkpoint(tmp_path) == str(tmp_path / "step100.ckpt")
        train(engine, 41)
        engine.wait()
        assert latest_valid_checkpoint(tmp_path) == str(tmp_path / "step41.ckpt")


def test_commits_are_numbered_and_name_their_parents(tmp_path: Path) -> None:
    went_back(tmp_path)
    found = {each.name: each for each in committed_checkpoints(tmp_path)}
    assert {name: (each.commit_number, each.parent) for name, each in found.items()} == {
        "step20": (1, None),
        "step40": (2, "step20"),
        "step60": (3, "step40"),
        "step80": (4, "step60"),
        "step100": (5, "step80"),
        "step50-v1": (6, "step40"),
        "step60-v1": (7, "step50-v1"),
    }
    assert found["step60-v1"].abandoned == ("step100", "step60", "step80")
    assert found["step100"].abandoned == ()


def test_a_fall_back_keeps_to_the_branch(tmp_path: Path) -> None:
    """The run went back since what it left was worse; damage must not lead there again."""
    went_back(tmp_path)
    for name in ("step60-v1", "step50-v1"):
        (tmp_path / f"{name}.ckpt").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="passed over"):
        assert latest_valid_checkpoint(tmp_path) == str(tmp_path / "step40.ckpt")


def test_what_was_left_is_known_to_every_run_that_follows(tmp_path: Path) -> None:
    went_back(tmp_path)
    with SnapshotEngine(tmp_path) as engine:
        left = engine.continue_from("step50-v1", 50)  # back once more
        assert {found.name for found in left} == {"step60", "step80", "step100", "step60-v1"}
        left = engine.continue_from("step80", 80)  # or to what was left
        assert {found.name for found in left} == {"step100", "step50-v1", "step60-v1"}


def test_a_run_that_goes_on_from_another_folder_is_told_by_its_step(tmp_path: Path) -> None:
    """As where two callbacks save a run, and it is resumed from the other one's checkpoint."""
    went_back(tmp_path)
    with SnapshotEngine(tmp_path) as engine:
        left = engine.continue_from(None, 55)
        assert {found.name for found in left} == {"step60", "step60-v1", "step80", "step100"}
        train(engine, 58)
    newest = committed_checkpoints(tmp_path)[0]
    assert (newest.name, newest.parent) == ("step58", "step50-v1")
    with SnapshotEngine(tmp_path) as engine:
        left = engine.continue_from(None, 200)
        assert {found.name for found in left} == {"step60", "step60-v1", "step80", "step100"}
        assert engine.continue_from(None, 10)  # before all of them


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["save", "back", "delete"]), st.integers(0, 99))))
def test_any_number_of_ways(actions: list[tuple[str, int]]) -> None:
    """Against a list of parents: the last commit is the latest; what leads to it is not left."""
    parents: dict[str, str | None] = {}
    steps: dict[str, int] = {}
    there: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        engine = opened.enter_context(SnapshotEngine(folder))
        at: str | None = None
        for action, number in actions:
            if action == "save":
                name = f"save{len(parents)}"
                parents[name], steps[name] = at, steps.get(at or "", 0) + 1 + number % 3
                engine.save({}, name, steps[name])
                engine.wait()
                there.append(name)
                at = name
            elif there and action == "back":
                at = there[number % len(there)]
                opened.close()
                engine = opened.enter_context(SnapshotEngine(folder))
                way = {at, *ancestors(at, parents)}
                left = engine.continue_from(at, steps[at])
                assert {found.name for found in left} == {*there} - way
            elif there and (gone := there[number % len(there)]) not in (at, there[-1]):
                engine.delete(gone)
                engine.wait()
                there.remove(gone)
        if there:
            newest = committed_checkpoints(folder)[0]
            assert (newest.name, newest.parent) == (there[-1], parents[there[-1]])
            way = {newest.name, *ancestors(newest.name, parents)}
            found = stored(folder)
            assert {*found} == {*there}
            on_the_way = [name for name in reversed(there) if name in way]
            assert found[: len(on_the_way)] == on_the_way, "a fall back keeps to it"


def ancestors(name: str, parents: dict[str, str | None]) -> Iterator[str]:
    while (parent := parents[name]) is not None:
        yield parent
        name = parent


def test_numbers_and_neither_clock_nor_step_decide_and_old_manifests_come_before() -> None:
    def manifest(name: str, step: int, saved_at: float, commit: int = 0) -> Manifest:
        lineage = {"lineage": {"commit": commit, "parent": None, "abandoned": []}} if commit else {}
        file = StoredFile(f"{name}.ckpt", 1, "0" * 32)
        return Manifest.from_json(
            Manifest(name, step, (file,), lineage, saved_at=saved_at).to_json()
        )

    found = [
        manifest("old 7", 7, 9e9),
        manifest("old 9", 9, 1.0),
        manifest("old 9, later", 9, 2.0),
        manifest("first", 100, 5e9, commit=1),
        manifest("second", 3, 0.0, commit=2),
    ]
    assert [each.name for each in newest_first(found)] == [
        *("second", "first", "old 9, later", "old 9", "old 7")
    ]


def test_the_lineage_is_no_metadata_of_the_user(tmp_path: Path) -> None:
    with (
        SnapshotEngine(tmp_path) as engine,
        pytest.raises(ValueError, match=r"metadata=.*: 'lineage' is the engine's own. Rename it"),
    ):
        engine.save({}, "a", 1, {"lineage": "mine"})


def withdraws(engine: SnapshotEngine, step: int) -> list[str]:
    return engine.withdraw(lambda at, _: at > step)


def test_what_was_withdrawn_is_last_at_once_and_after_a_crash(tmp_path: Path) -> None:
    """No commit comes behind it: the process is gone."""
    with SnapshotEngine(tmp_path) as engine:
        train(engine, 20, 40, 60)
        engine.wait()
        assert withdraws(engine, 30) == ["step40", "step60"]
        assert [found.name for found in engine.committed] == stored(tmp_path)
    assert stored(tmp_path) == ["step20", "step60", "step40"]
    assert latest_valid_checkpoint(tmp_path) == str(tmp_path / "step20.ckpt")
    with SnapshotEngine(tmp_path) as engine:
        assert engine.withdrawn == {"step40", "step60"}
        assert withdraws(engine, 30) == [], "once"
        train(engine, 35)
        engine.wait()
        newest = committed_checkpoints(tmp_path)[0]
        assert (newest.parent, set(newest.abandoned)) == ("step20", {"step40", "step60"})
        engine.delete("step40")
        engine.wait()
    assert stored(tmp_path) == ["step35", "step20", "step60"]
    assert not list(tmp_path.glob("step40*"))


def test_one_that_is_being_written_is_withdrawn_before_it_is_committed(tmp_path: Path) -> None:
    with SnapshotEngine(tmp_path, keep_last=3) as engine:
        train(engine, 20, 40)
        withdraws(engine, 30)  # it may or may not be written by now
        train(engine, 35)
    assert stored(tmp_path) == ["step35", "step20", "step40"]
    newest = committed_checkpoints(tmp_path)[0]
    assert (newest.parent, newest.abandoned) == ("step20", ("step40",))


def test_if_nothing_else_is_whole_it_is_taken_with_a_warning(tmp_path: Path) -> None:
    with SnapshotEngine(tmp_path) as engine:
        train(engine, 20)
        engine.wait()
        withdraws(engine, 10)
    with pytest.warns(UserWarning, match="had gone back behind, and nothing else is whole"):
        assert latest_valid_checkpoint(tmp_path) == str(tmp_path / "step20.ckpt")


def test_a_resume_from_elsewhere_goes_on_from_the_newest_that_counts(tmp_path: Path) -> None:
    with SnapshotEngine(tmp_path) as engine:
        train(engine, 20, 40, 60)
        engine.wait()
        withdraws(engine, 50)
    with SnapshotEngine(tmp_path) as engine:
        assert [found.name for found in engine.continue_from(None, 30)] == ["step40"]
        train(engine, 35)
        engine.wait()
        newest = committed_checkpoints(tmp_path)[0]
        assert (newest.parent, set(newest.abandoned)) == ("step20", {"step40", "step60"})
        assert withdraws(engine, 30) == ["step35"], "those left by the resume stay until replaced"


def test_a_sign_of_what_came_to_nothing_is_swept(tmp_path: Path) -> None:
    (tmp_path / "step9.ckpt.withdrawn").touch()
    with SnapshotEngine(tmp_path) as engine:
        assert engine.withdrawn == set()
        train(engine, 9)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt*")) == [
        "step9.ckpt",
        "step9.ckpt.json",
    ]


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with SnapshotEngine(tmp_path) as engine:
        train(engine, 20, 40)
        engine.wait()
        monkeypatch.setattr("lightning_align.checkpointing.engine.withdraw", full)
        withdraws(engine, 30)
        assert engine.committed[0].name == "step20", "this process knows"
        assert "Until the next checkpoint is committed" in engine.pop_errors()[0].message
