"""Ranks that have committed different steps go on at one of them, or are refused."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from lightning_align.modules import PretrainModule
from lightning_align.offload.record import BEFORE, FILE, read_record
from tests.helpers.offloaded import ADAMW, STEPS, assert_same, small, text
from tests.helpers.ranks import end_of_ranks, run_ranks
from tests.helpers.tiny_models import PlainDecoder
from tests.strategies.zero_infinity.test_ranks import fit


def record_of(folder, rank):
    return folder / "zero_infinity" / f"rank{rank:05d}" / FILE


def train(folder, rank, ckpt_path=None, before=None, **options):
    """Train on this rank; ``before`` is called before each renaming."""
    replace = Path.replace
    if before is not None:
        Path.replace = lambda *args: before() or replace(*args)
    torch.manual_seed(0)
    module = PretrainModule(PlainDecoder(dropout=0.1), optimizer=ADAMW)
    strategy = small(timeout=timedelta(seconds=30))
    data = text(batch_size=1, shuffle=True)
    options = {"accumulate_grad_batches": 2, **options}
    trainer = fit(folder, rank, module, data, strategy, ckpt_path, **options)
    found = {
        "module": trainer.strategy.lightning_module_state_dict(),
        "optimizer": trainer.strategy.optimizer_state(trainer.optimizers[0]),
    }
    trainer.strategy.close()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run comes to."""
    folder = tmp_path_factory.mktemp("whole")
    return run_ranks(lambda rank: train(folder, rank), timeout_s=120)[0]


@pytest.mark.parametrize(
    "step", [1, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, STEPS))]
)
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_between_two_commits_takes_one_of_them_back(tmp_path, whole, victim, step):
    """The other rank has committed the step already, and goes back to the one before."""
    own, other = (record_of(tmp_path, rank) for rank in (victim, 1 - victim))
    renamings, seen = [], tmp_path / "seen"

    def before():
        renamings.append(1)
        if len(renamings) == step:
            while not (other.exists() and read_record(other.parent).step == step):
                time.sleep(0.01)
            record = read_record(own.parent)
            seen.write_text(str(record and record.step))
            os.kill(os.getpid(), signal.SIGKILL)

    def first(rank):
        train(tmp_path, rank, before=before if rank == victim else None)

    ended = end_of_ranks(first, timeout_s=90)
    assert ended[victim].exit_code == -signal.SIGKILL
    assert not ended[1 - victim].stuck
    assert seen.read_text() == (str(step - 1) if step > 1 else "None")
    found = run_ranks(lambda rank: train(tmp_path, rank, "last"), timeout_s=120)[0]
    assert_same(found, whole)


def test_without_the_record_before_ranks_that_differ_are_refused(tmp_path):
    """Else the test above would show nothing."""
    run_ranks(lambda rank: train(tmp_path, rank), timeout_s=120)
    ahead, behind = (record_of(tmp_path, rank) for rank in range(2))
    behind.with_name(BEFORE).replace(behind)
    ahead.with_name(BEFORE).unlink()
    ended = end_of_ranks(lambda rank: train(tmp_path, rank, "last"), timeout_s=90)
    assert f"the ranks have committed steps [{STEPS}, {STEPS - 1}]" in ended[0].error
    assert "rank 0 has failed" in ended[1].error
    assert read_record(ahead.parent).step == STEPS


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_another_number_of_ranks_is_refused(tmp_path, first, second):
    run_ranks(lambda rank: train(tmp_path, rank, size=first), first, timeout_s=120)
    ended = end_of_ranks(lambda rank: train(tmp_path, rank, "last", size=second), second, 90)
    told = f"of {first} rank(s)" if second == 1 else f"which {first} rank(s) have committed"
    for end in ended:
        assert told in end.error
        assert "from a checkpoint" in end.error
    assert read_record(record_of(tmp_path, 0).parent).step == STEPS * 2 // first
