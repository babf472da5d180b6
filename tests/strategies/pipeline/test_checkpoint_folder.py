"""The quick part; tests/strategies/pipeline/test_checkpoint_folder_of_runs.py has the rest."""

import os
import shutil
import signal
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed

from lightning_align._compat import torch_dcp
from lightning_align.strategies import replacing
from lightning_align.strategies.distributed_folder import META_FILE, DistributedFolder
from lightning_align.strategies.pipeline import checkpoint_folder
from tests.helpers.pipelines import PositionedBatches, Run
from tests.helpers.ranks import end_of_ranks, run_ranks
from tests.strategies.pipeline.test_checkpoints import SaveAt

STRATEGY = {"schedule": "1F1B", "num_microbatches": 4, "save_distributed_checkpoint": True}
RUN = Run("chain", STRATEGY, steps=4)


def test_each_rank_reads_its_own_stages_and_goes_on_exactly(tmp_path: Path) -> None:
    """The learning rate is the checkpoint's, and not that of the module that goes on."""
    folder = tmp_path / "step2"

    def train(rank: int) -> list[float]:
        with RUN.setting(rank) as (trainer, seen):
            trainer.callbacks.append(SaveAt(2, folder))
            trainer.fit(RUN.module(), datamodule=PositionedBatches(4, masked=False))
        losses: list[float] = seen.losses
        return losses

    def resume(rank: int) -> tuple[list[float], set[str], set[str]]:
        run = Run(**{**vars(RUN), "optimizer": partial(torch.optim.AdamW, lr=1.0)})
        keys: set[str] = set()
        read = torch_dcp.read

        def note(path: Path, index: Any, wanted: Any) -> dict[str, Any]:
            keys.update(torch_dcp.names(index)[key][1] for key in wanted if "model." in key)
            return read(path, index, wanted)

        with run.setting(rank) as (trainer, seen), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_dcp, "read", note)
            module = run.module()
            trainer.fit(module, datamodule=PositionedBatches(4, masked=False), ckpt_path=folder)
        here = {name for name, value in module.named_parameters() if not value.is_meta}
        return seen.losses, keys, here

    whole = run_ranks(train)[0]
    for losses, keys, here in run_ranks(resume):
        assert losses == whole[2:]
        assert keys == here


# Killed while one takes the place of another

PRIMITIVES = ("replace", "rename", "unlink", "rmdir", "mkdir")


class Killer:
    """Kills the process before its ``number``-th change to a folder from when it is armed."""

    def __init__(self, number: int) -> None:
        self.left = number
        for name in PRIMITIVES:
            setattr(os, name, partial(self._count, getattr(os, name)))

    def _count(self, change: Any, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*args, **kwargs)


def save(path: Path, value: float, kill_at: int | None = None) -> bool:
    """Save on one rank; whether it lived to the end."""

    def write(others: Any, file: Path) -> None:
        torch.save(others, file)
        if kill_at is not None:
            Killer(kill_at)

    def run(_: int) -> None:
        state = {"state_dict": {"weight": torch.full((3,), value)}, "value": value}
        checkpoint_folder.save(state, str(path), distributed.group.WORLD, write)

    [end] = end_of_ranks(run, 1)
    assert end.exit_code in (0, -signal.SIGKILL), end.error
    return end.exit_code == 0


def value_at(path: Path) -> float:
    """What is read, and that all of it is of one save."""
    place = replacing.whereabouts(path)
    if place.is_file():
        return float(torch.load(place)["value"])
    index = torch_dcp.read_index(place)
    DistributedFolder(place, "test")
    value = float(torch.load(place / META_FILE)["value"])
    state = torch_dcp.read(place, index, list(torch_dcp.names(index)))
    assert torch.equal(state["model"]["weight"], torch.full((3,), value))
    return value


def test_a_save_that_is_killed_anywhere_loses_nothing_and_blocks_nothing(tmp_path: Path) -> None:
    """Before each rename and each file that is deleted of the old one."""
    first, seen = tmp_path / "first", []
    save(first, 1.0)
    for kill_at in range(1, 30):
        path = tmp_path / str(kill_at) / "last.ckpt"
        shutil.copytree(first, path)
        ended = save(path, 2.0, kill_at)
        seen.append(value_at(path))
        if kill_at % 3 == 1 or ended:
            assert save(path, 3.0)
            assert value_at(path) == 3
            assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]
        if ended:
            break
    assert kill_at > 7, "three renames, one more to discard the old one, its three files, itself"
    assert seen == [1.0] + [2.0] * (kill_at - 1), "once it is whole it is the checkpoint"


def test_what_a_version_before_has_left_blocks_nothing(tmp_path: Path) -> None:
    """It deleted under the name of the old one, and could end between two renames."""
    half_deleted, between = tmp_path / "a", tmp_path / "b"
    for path in (half_deleted, between):
        save(path, 1.0)
    (tmp_path / ".a.old").mkdir()
    (tmp_path / ".a.old" / "__0_0.distcp").touch()
    between.rename(tmp_path / ".b.old")
    shutil.copytree(half_deleted, tmp_path / ".b.unfinished")
    for path in (half_deleted, between):
        assert value_at(path) == 1
        assert save(path, 2.0)
        assert value_at(path) == 2
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b"}


def test_removing_that_is_killed_leaves_no_half_of_a_checkpoint(tmp_path: Path) -> None:
    first = tmp_path / "first"
    save(first, 1.0)
    there = []
    for kill_at in range(1, 8):
        path = tmp_path / str(kill_at) / "last.ckpt"
        shutil.copytree(first, path)

        def run(_: int, path: Path = path, kill_at: int = kill_at) -> None:
            Killer(kill_at)
            replacing.remove(path)

        end_of_ranks(run, 1, group=False)
        there.append(replacing.whereabouts(path).exists())
        assert not there[-1] or value_at(path) == 1
    assert save(path, 2.0)
    assert there[0]
    assert there == sorted(there, reverse=True)
    assert not there[4], "a rename takes it away, before its files go"


def test_a_killed_replacement_is_read_with_a_warning_and_goes_on_exactly(tmp_path: Path) -> None:
    path = tmp_path / "step2"

    def train(rank: int) -> list[float]:
        with RUN.setting(rank) as (trainer, seen):
            trainer.callbacks.append(SaveAt(2, path))
            trainer.fit(RUN.module(), datamodule=PositionedBatches(4, masked=False))
        losses: list[float] = seen.losses
        return losses

    def resume(rank: int) -> list[float]:
        with RUN.setting(rank) as (trainer, seen):
            told = pytest.warns(UserWarning, match=r"replacing .*step2 was killed; .*\.step2\.new")
            with told if rank == 0 else warnings.catch_warnings():
                trainer.fit(
                    RUN.module(), datamodule=PositionedBatches(4, masked=False), ckpt_path=path
                )
            trainer.save_checkpoint(path)
        losses: list[float] = seen.losses
        return losses

    whole = run_ranks(train)[0]
    path.rename(tmp_path / ".step2.new")
    assert run_ranks(resume)[0] == whole[2:]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step2"]


def test_a_run_does_not_begin_anew_beside_a_killed_replacement(tmp_path: Path) -> None:
    """Lightning finds no last checkpoint there, and would train from scratch."""

    def train(rank: int, ckpt_path: Any) -> list[float]:
        with RUN.setting(rank) as (trainer, seen):
            trainer.callbacks.append(
                ModelCheckpoint(tmp_path, every_n_train_steps=3, save_last=True)
            )
            data = PositionedBatches(4, masked=False)
            trainer.fit(RUN.module(), datamodule=data, ckpt_path=ckpt_path)
        losses: list[float] = seen.losses
        return losses

    whole = run_ranks(partial(train, ckpt_path=None))[0]
    path = tmp_path / "last.ckpt"
    path.rename(tmp_path / ".last.ckpt.new")

    def refused(rank: int) -> str:
        with pytest.raises(ValueError, match="killed before it had renamed") as raised:
            train(rank, "last")
        return str(raised.value)

    for message in run_ranks(refused):
        assert f"Resume with ckpt_path={str(path)!r}" in message
    assert replacing.empty_places(tmp_path) == [path]
    assert run_ranks(partial(train, ckpt_path=path))[0] == whole[3:]
    assert path.is_dir()
