"""What fails on one rank ends all of them, and each says where it was."""

from __future__ import annotations

import errno
import os
from datetime import timedelta
from functools import partial

import lightning.pytorch as pl
import pytest

from lightning_align.offload.record import read_record
from tests.helpers.offloaded import Regression, assert_same, points, small
from tests.helpers.ranks import end_of_ranks, run_ranks
from tests.strategies.zero_infinity.test_ranks import fit

SLOW = pytest.mark.slow
CALLS = ("preadv", "fdatasync")


def train(rank, folder, ckpt_path=None, *callbacks, **options):
    strategy = small(timeout=timedelta(seconds=60), **options)
    data = points(4)
    module = Regression()
    trainer = fit(folder, rank, module, data, strategy, ckpt_path, callbacks=list(callbacks))
    state = {n: v.clone() for n, v in trainer.strategy.lightning_module_state_dict().items()}
    trainer.strategy.close()
    return state


class Fails(pl.Callback):
    """Lets an operation of the system fail from the third step on, on one rank."""

    def __init__(self, rank, call):
        self.rank, self.call = rank, call

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3 and trainer.global_rank == self.rank:
            setattr(os, self.call, self.fail)

    def fail(self, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run_ranks(partial(train, folder=tmp_path_factory.mktemp("whole")))[0]


def ends(run):
    ended = end_of_ranks(run, 2, timeout_s=120)
    assert [end.exit_code for end in ended] == [1, 1]
    assert not any(end.stuck for end in ended)
    return [end.error for end in ended]


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=SLOW)])
@pytest.mark.parametrize("call", ["pwritev", *(pytest.param(c, marks=SLOW) for c in CALLS)])
def test_an_error_of_one_disk_ends_all_and_is_gone_on_from(tmp_path, whole, rank, call):
    def run(here):
        train(here, tmp_path, None, Fails(rank, call))

    errors = ends(run)
    assert "Input/output error" in errors[rank]
    for here, error in enumerate(errors):
        # A write is waited for later: in the next step, or at its end.
        assert any(f"rank {here}, after step {step}" in error for step in (3, 4))
        assert f"rank0000{here}: step " in error
    assert f"rank {rank}" in errors[1 - rank]
    assert_same(run_ranks(partial(train, folder=tmp_path, ckpt_path="last"))[0], whole)


@pytest.fixture
def committed(tmp_path):
    """The folders of a run of two ranks that has ended."""
    run_ranks(partial(train, folder=tmp_path))
    return [tmp_path / "zero_infinity" / f"rank0000{rank}" for rank in range(2)]


def test_what_one_rank_holds_is_not_overwritten(tmp_path, committed):
    (committed[0] / "committed").unlink()
    for error in ends(partial(train, folder=tmp_path)):
        assert "rank00001 holds step 6 of an earlier run" in error
    assert read_record(committed[1]).step == 6


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=SLOW)])
def test_damage_of_one_rank_is_told_on_all(tmp_path, committed, rank):
    slot = read_record(committed[rank]).slots["parts.1"]
    os.truncate(committed[rank] / f"00001.{slot}.block", 0)
    for error in ends(partial(train, folder=tmp_path, ckpt_path="last")):
        assert f"rank0000{rank}/00001.{slot}.block is damaged: it has 0 of" in error


def test_a_folder_that_one_rank_cannot_make(tmp_path):
    (tmp_path / "zero_infinity").mkdir()
    (tmp_path / "zero_infinity" / "rank00001").touch()
    for error in ends(partial(train, folder=tmp_path)):
        assert "rank00001 cannot be written" in error


@pytest.mark.parametrize("ckpt_path", [None, "last"])
def test_a_node_on_which_the_path_is_missing(tmp_path, ckpt_path):
    """Each node has drives of its own, and all ranks hear of the one that has none."""

    def run(rank):
        parent = tmp_path if rank == 0 else tmp_path / "not mounted"
        train(rank, tmp_path, ckpt_path, nvme_path=str(parent / "nvme"))

    for error in ends(run):
        assert "not mounted is not there" in error
