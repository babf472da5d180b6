"""What a run is told of its saves."""

from pathlib import Path

import pytest
import torch

from lightning_align.checkpointing import Commit, SnapshotEngine, load_checkpoint
from tests.helpers.faulty_files import faulty


def test_a_commit_names_a_file_that_is_there(tmp_path: Path) -> None:
    told: list[tuple[Commit, float]] = []

    def on_commit(commit: Commit) -> None:
        told.append((commit, load_checkpoint(commit.path)["weight"].sum().item()))

    with SnapshotEngine(tmp_path, on_commit=on_commit) as engine:
        result = engine.save({"weight": torch.ones(6)}, "a", 3)
    assert (result.copied_bytes, result.skipped, result.replaced) == (24, False, ())
    assert result.stall_s >= result.waited_s >= 0
    [(commit, total)] = told
    assert (commit.manifest.name, commit.manifest.step, total) == ("a", 3, 6)


def test_an_error_says_in_a_sentence_what_is_intact() -> None:
    def refuse(operation: str, name: str) -> None:
        if (operation, name) == ("write", "b.ckpt"):
            raise PermissionError(13, "denied")

    with faulty(refuse):
        engine = SnapshotEngine("faulty://run")
        engine.save({"weight": torch.ones(6)}, "a", 1)
        engine.wait()
        engine.save({"weight": torch.ones(6)}, "b", 2)
        engine._writer.wait(timeout_s=30)
        (error,) = engine.pop_errors()
        engine.close()
    assert (error.name, error.step) == ("b", 2)
    assert str(error) == error.message
    assert "denied" in str(error)
    assert "step 1" in str(error)
    with pytest.raises(PermissionError):
        raise error.error
