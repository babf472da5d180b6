"""``last.ckpt`` shows a whole checkpoint at any time, and never takes the place of a file."""

import os
from pathlib import Path

import pytest
import torch

from lightning_align.checkpointing import SnapshotEngine, load_checkpoint
from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.last_link import LastLink, shown_by


def saved(folder: Path, *steps: int) -> None:
    with SnapshotEngine(folder) as engine:
        for step in steps:
            engine.save({"step": torch.tensor(step)}, f"step={step}", step)


def test_a_link_shows_what_it_was_told_last(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    link = LastLink(Folder(tmp_path), wanted=True)
    for name in ("step=1", "step=2", ""):
        link.show(name)
    assert os.readlink(tmp_path / "last.ckpt") == "step=2.ckpt"
    assert shown_by(Folder(tmp_path), "last") == "step=2"
    assert shown_by(Folder(tmp_path), "step=1") == "step=1"
    assert torch.load(tmp_path / "last.ckpt")["step"] == 2
    assert load_checkpoint(tmp_path / "last.ckpt")["step"] == 2, "by its manifest"


def test_a_link_that_is_there_is_kept_up_though_nobody_wants_one(tmp_path: Path) -> None:
    """Or it would show what is deleted some day."""
    saved(tmp_path, 1, 2)
    LastLink(Folder(tmp_path), wanted=False).show("step=1")
    assert not (tmp_path / "last.ckpt").exists()
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    LastLink(Folder(tmp_path), wanted=False).show("step=2")
    assert (tmp_path / "last.ckpt").resolve().name == "step=2.ckpt"


def test_what_a_kill_has_left_is_no_hindrance(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / ".last.ckpt.link").symlink_to("gone.ckpt")
    LastLink(Folder(tmp_path), wanted=True).show("step=1")
    assert (tmp_path / "last.ckpt").resolve().name == "step=1.ckpt"
    assert not os.path.lexists(tmp_path / ".last.ckpt.link")


@pytest.mark.parametrize("kind", ["file", "link elsewhere", "folder"])
def test_what_is_no_link_of_ours_stays_and_is_told_of_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "last.ckpt"
    if kind == "file":
        path.write_text("ModelCheckpoint's")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/elsewhere/last.ckpt")
    link = LastLink(Folder(tmp_path), wanted=True)
    with pytest.warns(UserWarning, match=r"last.ckpt cannot show the newest .*fit\(ckpt_path='l"):
        link.show("step=1")
    link.show("step=2")
    assert not path.is_symlink() or os.readlink(path) == "/elsewhere/last.ckpt"
    assert kind != "file" or path.read_text() == "ModelCheckpoint's"


def test_a_url_has_none() -> None:
    link = LastLink(Folder("memory://links"), wanted=True)
    link.show("step=1")
    assert not link.is_kept
    assert shown_by(Folder("memory://links"), "last") == "last"
