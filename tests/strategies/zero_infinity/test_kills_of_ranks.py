"""A rank that is killed at any moment, also between two ranks' commits: all resume at one step."""

from __future__ import annotations

import os
import random
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align.modules import PretrainModule
from lightning_align.offload.files import DirectFile
from lightning_align.offload.record import BEFORE, FILE, read_record
from tests.helpers.offloaded import ADAMW, STEPS, assert_same, batches, small
from tests.helpers.ranks import end_of_ranks, run_ranks
from tests.helpers.tiny_models import PlainDecoder
from tests.strategies.zero_infinity.test_ranks import fit

# An update after backward, and one inside of it.
BOTH = {"clipped": {"gradient_clip_val": 0.5}, "early": {}}


def record_of(folder, rank):
    return folder / "zero_infinity" / f"rank{rank:05d}" / FILE


def train(folder, rank, ckpt_path=None, before=lambda number, name: None, **options):
    """Train on this rank; ``before`` is called with each operation on its files."""
    done = []

    def counted(operation, *args, **kwargs):
        done.append(operation.__name__)
        before(len(done), operation.__name__)
        return operation(*args, **kwargs)

    for owner, name in (
        (DirectFile, "write"),
        (DirectFile, "read"),
        (DirectFile, "sync"),
        (Path, "replace"),
    ):
        operation = getattr(owner, name)
        setattr(owner, name, lambda *a, _operation=operation, **o: counted(_operation, *a, **o))
    torch.manual_seed(0)
    module = PretrainModule(PlainDecoder(dropout=0.1), optimizer=ADAMW)
    strategy = small(timeout=timedelta(seconds=30))
    data = DataLoader(batches(count=STEPS * 2), batch_size=1, shuffle=True)
    options = {"accumulate_grad_batches": 2, **options}
    trainer = fit(folder, rank, module, data, strategy, ckpt_path, **options)
    found = {
        "module": trainer.strategy.lightning_module_state_dict(),
        "optimizer": trainer.strategy.optimizer_state(trainer.optimizers[0]),
    }
    steps = trainer.global_step
    trainer.strategy.close()
    return found, done, steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What uninterrupted runs come to, and the operations of each rank."""
    ends = {}
    for name, options in BOTH.items():
        folder = tmp_path_factory.mktemp(name)
        ends[name] = run_ranks(partial(train, folder, **options), timeout_s=120)
    return ends


def killed_here(_, __):
    os.kill(os.getpid(), signal.SIGKILL)


def resumed(folder, victim, before, **options):
    """Train, let one rank be killed, and go on."""

    def first(rank):
        train(folder, rank, before=before if rank == victim else lambda *_: None, **options)

    ended = end_of_ranks(first, timeout_s=90)
    assert ended[victim].exit_code == -signal.SIGKILL
    assert not ended[1 - victim].stuck
    return run_ranks(lambda rank: train(folder, rank, "last", **options), timeout_s=120)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    "number", [n if n < 2 else pytest.param(n, marks=pytest.mark.slow) for n in range(15)]
)
def test_a_run_of_which_a_rank_was_killed_ends_as_if_it_had_not_been(tmp_path, whole, number, name):
    draw = random.Random(f"{name} {number}")
    victim = draw.randrange(2)
    kill_at = draw.randrange(1, len(whole[name][victim][1]) + 1)

    def before(done, _):
        if done == kill_at:
            killed_here(done, _)

    found = resumed(tmp_path, victim, before, **BOTH[name])
    assert_same(found[0][0], whole[name][0][0])


@pytest.mark.parametrize("step", [1, 3, STEPS])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_between_two_commits_takes_one_of_them_back(tmp_path, whole, victim, step):
    """The other rank has committed the step already, and goes back to the one before."""
    other, renamings, seen = record_of(tmp_path, 1 - victim), [], tmp_path / "seen"

    def before(_, operation):
        renamings.extend([operation] * (operation == "replace"))
        if len(renamings) == step:
            while not (other.exists() and read_record(other.parent).step == step):
                time.sleep(0.01)
            before_it = read_record(record_of(tmp_path, victim).parent)
            seen.write_text(str(before_it and before_it.step))
            killed_here(_, operation)

    found = resumed(tmp_path, victim, before, **BOTH["early"])
    assert seen.read_text() == (str(step - 1) if step > 1 else "None")
    assert_same(found[0][0], whole["early"][0][0])


def test_without_the_record_before_ranks_that_differ_are_refused(tmp_path):
    """Else the test above would show nothing."""
    run_ranks(lambda rank: train(tmp_path, rank)[2], timeout_s=120)
    ahead, behind = (record_of(tmp_path, rank) for rank in range(2))
    behind.with_name(BEFORE).replace(behind)
    ahead.with_name(BEFORE).unlink()
    ended = end_of_ranks(lambda rank: train(tmp_path, rank, "last"), timeout_s=90)
    assert f"the ranks have committed steps [{STEPS}, {STEPS - 1}]" in ended[0].error
    assert "rank 0 has failed" in ended[1].error
    assert read_record(ahead.parent).step == STEPS


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_another_number_of_ranks_is_refused(tmp_path, first, second):
    run_ranks(lambda rank: train(tmp_path, rank, size=first)[2], first, timeout_s=120)
    ended = end_of_ranks(lambda rank: train(tmp_path, rank, "last", size=second), second, 90)
    told = f"of {first} rank(s)" if second == 1 else f"which {first} rank(s) have committed"
    for end in ended:
        assert told in end.error
        assert "from a checkpoint" in end.error
    assert read_record(record_of(tmp_path, 0).parent).step == STEPS * 2 // first
