"""SIGKILL of one rank before any operation on the disk: both end, and go on at one whole step."""

from __future__ import annotations

import os
import random
import signal
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_align.modules import PretrainModule
from lightning_align.offload import record
from lightning_align.offload.files import DirectFile
from tests.helpers.offloaded import ADAMW, assert_same, small, text
from tests.helpers.ranks import end_of_ranks, run_ranks
from tests.helpers.tiny_models import PlainDecoder
from tests.strategies.zero_infinity.test_ranks import fit

# An update after backward, and one inside of it.
BOTH = {"clipped": {"gradient_clip_val": 0.5}, "early": {}}
KINDS = ((DirectFile, "write"), (DirectFile, "read"), (DirectFile, "sync"), (Path, "replace"))


def run(rank, folder: Path, ckpt_path=None, *, kill=(None, None), name):
    """Train, and let the rank of ``kill`` be killed before its operation of that number."""
    done = []

    def counted(operation, *args, **options):
        path = getattr(args[0], "path", args[0])
        done.append((operation.__name__, getattr(path, "name", "")))
        if (rank, len(done)) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*args, **options)

    for owner, operation in KINDS:
        setattr(owner, operation, partial_of(counted, getattr(owner, operation)))
    torch.manual_seed(0)
    module = PretrainModule(PlainDecoder(dropout=0.1), optimizer=ADAMW)
    strategy = small(nvme_path=str(folder / "nvme"), timeout=timedelta(seconds=60))
    data = text(rows=4, shuffle=True)
    options = {"accumulate_grad_batches": 2, **BOTH[name]}
    trainer = fit(folder, rank, module, data, strategy, ckpt_path, **options)
    operations = list(done)
    found = {
        "module": trainer.strategy.lightning_module_state_dict(),
        "optimizer": trainer.strategy.optimizer_state(trainer.optimizers[0]),
        "operations": operations,
    }
    found = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, found)
    trainer.strategy.close()
    return found


def partial_of(counted, operation):
    """A function and no partial: it becomes a method."""
    return lambda *args, **options: counted(operation, *args, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What uninterrupted runs come to, by rank."""
    return {
        name: run_ranks(partial(run, folder=tmp_path_factory.mktemp(name), name=name))
        for name in BOTH
    }


def is_killed_and_goes_on(tmp_path, whole, name, kill):
    ended = end_of_ranks(partial(run, folder=tmp_path, kill=kill, name=name), 2, timeout_s=120)
    assert ended[kill[0]].exit_code == -signal.SIGKILL
    assert not ended[1 - kill[0]].stuck, "it waits for a rank that is dead"
    assert ended[1 - kill[0]].exit_code == 1
    found = run_ranks(partial(run, folder=tmp_path, ckpt_path="last", name=name), 2)
    for ours, theirs in zip(found, whole[name], strict=True):
        for part in ("module", "optimizer"):
            assert_same(ours[part], theirs[part], part)


def some(count, at_once):
    """Numbers of tests, of which only the first few are not slow."""
    return [n if n < at_once else pytest.param(n, marks=pytest.mark.slow) for n in range(count)]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("number", some(14, 1))
def test_a_rank_that_is_killed_costs_no_more_than_the_step(tmp_path, whole, number, name):
    """Every second one in an update: before a block is written."""
    rank, draw = number // 2 % 2, random.Random(f"{name} {number}")
    operations = whole[name][rank]["operations"]
    updates = [at for at, (what, path) in enumerate(operations) if (what, path[5:]) in UPDATES]
    at = draw.choice(updates) if number % 2 else draw.randrange(len(operations))
    is_killed_and_goes_on(tmp_path, whole, name, (rank, at + 1))


UPDATES = {("write", ".0.block"), ("write", ".1.block")}


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("commit", some(3, 1))
def test_a_kill_between_the_commits_of_two_ranks_leaves_one_step(tmp_path, whole, commit, rank):
    operations = whole["early"][rank]["operations"]
    renamings = [
        at for at, done in enumerate(operations) if done == ("replace", f"{record.FILE}.new")
    ]
    assert len(renamings) == 6
    is_killed_and_goes_on(tmp_path, whole, "early", (rank, renamings[commit] + 1))
