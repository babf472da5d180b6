"""SIGKILL anywhere in the writing of a checkpoint: what is found is whole, and of one save."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch

from lightning_align.offload import linked
from lightning_align.strategies import replacing
from tests.helpers.children import in_child
from tests.helpers.offloaded import Regression, assert_same, fit, points, small
from tests.strategies.pipeline import test_checkpoint_folder as folders


def marked_at(path):
    """Which save is found, after its tensors were compared; None if none is."""
    place = replacing.whereabouts(path)
    if not place.exists():
        return None
    is_folder = place.is_dir()
    found = linked.read(place, "test", weights_only=True) if is_folder else torch.load(place)
    return found["marker"], found["state_dict"]


@pytest.mark.parametrize(
    "distributed", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["folder", "file"]
)
@pytest.mark.parametrize(
    "replaces", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["replaced", "new"]
)
def test_a_kill_leaves_what_was_there_or_what_is_new(tmp_path, monkeypatch, distributed, replaces):
    strategy = small(save_distributed_checkpoint=distributed)
    trainer = fit(tmp_path, Regression(), points(), strategy)
    state = dict(strategy.lightning_module_state_dict())
    path = tmp_path / "checkpoints" / "one.ckpt"

    def save(marker, kill_at=None):
        vars(trainer.lightning_module)["on_save_checkpoint"] = lambda checkpoint: checkpoint.update(
            marker=marker
        )
        if kill_at is not None:
            folders.Killer(kill_at)
        trainer.save_checkpoint(path)

    monkeypatch.setattr(folders, "PRIMITIVES", (*folders.PRIMITIVES, "link", "fsync", "write"))
    found, kill_at = set(), 0
    while True:
        kill_at += 1
        if replaces:
            save("old")
            assert [each.name for each in path.parent.iterdir()] == ["one.ckpt"]
        else:
            shutil.rmtree(path.parent, ignore_errors=True)
        ended = in_child(lambda: save("new", kill_at))  # noqa: B023
        assert ended in (0, -signal.SIGKILL)
        seen = marked_at(path)
        found.add(seen and seen[0])
        if seen is not None:
            assert_same(seen[1], state)
        if ended == 0:
            break
    assert seen[0] == "new"
    assert found == {"old" if replaces else None, "new"}
    assert kill_at > (15 if distributed else 3)


def test_a_killed_save_is_swept_by_the_next_one(tmp_path):
    trainer = fit(tmp_path, Regression(), points(), small())
    path = tmp_path / "checkpoints" / "one.ckpt"
    unfinished = replacing.begin(path)
    os.link(next(iter(tmp_path.rglob("*.block"))), unfinished / "00000.block")
    trainer.save_checkpoint(path)
    assert [each.name for each in path.parent.iterdir()] == ["one.ckpt"]
