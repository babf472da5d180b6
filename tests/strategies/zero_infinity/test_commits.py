"""SIGKILL before any operation on the disk: the run goes on at a whole step, to the bit."""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from itertools import product
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_align.modules import PretrainModule
from lightning_align.offload.files import DirectFile
from lightning_align.offload.record import read_record
from lightning_align.strategies import ZeROInfinityStrategy
from lightning_align.strategies.zero_infinity.commits import load_payload
from tests.helpers.children import in_child
from tests.helpers.covers import cover
from tests.helpers.offloaded import ADAMW, Regression, assert_same, fit, points, small, text
from tests.helpers.tiny_models import PlainDecoder


def run(folder: Path, ckpt_path=None, *, kill_at=None, result=None, options, **arguments):
    """Train, and be killed before the operation of that number on the files of the store."""
    done = []

    def counted(operation, *args, **options):
        path = getattr(args[0], "path", None)
        done.append((operation.__name__, path and path.name))
        if len(done) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*args, **options)

    for owner, name in (
        (DirectFile, "write"),
        (DirectFile, "read"),
        (DirectFile, "sync"),
        (os, "fsync"),  # of the new record, and of the folder behind its renaming
        (Path, "replace"),
    ):
        operation = getattr(owner, name)
        setattr(owner, name, lambda *a, _operation=operation, **o: counted(_operation, *a, **o))
    torch.manual_seed(0)
    module = PretrainModule(PlainDecoder(dropout=0.1), optimizer=ADAMW)
    strategy = ZeROInfinityStrategy(
        params_buffer_count=2, sub_group_size=2000, nvme_path=str(folder / "nvme"), **arguments
    )
    data = text(shuffle=True)
    trainer = fit(folder, module, data, strategy, ckpt_path, accumulate_grad_batches=2, **options)
    operations = list(done)
    if result is not None:
        found = {
            "module": trainer.strategy.lightning_module_state_dict(),
            "optimizer": trainer.strategy.optimizer_state(trainer.optimizers[0]),
            "operations": operations,
        }
        torch.save(found, result)


# An update after backward, and one inside of it.
BOTH = {"clipped": {"gradient_clip_val": 0.5}, "early": {}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What uninterrupted runs come to."""
    ends = {}
    for name, options in BOTH.items():
        folder = tmp_path_factory.mktemp(name)
        assert in_child(partial(run, folder, result=folder / "result", options=options)) == 0
        ends[name] = torch.load(folder / "result")
    return ends


def resumed(tmp_path, kill_at, **arguments):
    killed = in_child(partial(run, tmp_path, kill_at=kill_at, **arguments))
    assert killed == -signal.SIGKILL
    result = tmp_path / "result"
    assert in_child(partial(run, tmp_path, "last", result=result, **arguments)) == 0
    return torch.load(result)


AT_ONCE = {(0, "clipped"), (1, "early")}


@pytest.mark.parametrize(
    ("number", "name"),
    [
        pytest.param(*run, marks=() if run in AT_ONCE else pytest.mark.slow)
        for run in product(range(15), BOTH)
    ],
)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(tmp_path, whole, number, name):
    """Every second one is killed in an update: before a block is written."""
    draw, operations = random.Random(f"{name} {number}"), whole[name]["operations"]
    updates = [at for at, done in enumerate(operations) if done[0] == "write"]
    at = draw.choice(updates) if number % 2 else draw.randrange(len(operations))
    found = resumed(tmp_path, at + 1, options=BOTH[name])
    for part in ("module", "optimizer"):
        assert_same(found[part], whole[name][part], part)


@cover(operation=["replace", "fsync", "fsync of the folder"], name=list(BOTH))
def test_a_kill_in_the_middle_of_a_commit_leaves_one_step(tmp_path, whole, operation, name):
    """Before the new record is durable, between that and its renaming, and behind both."""
    operations = [done for done, _ in whole[name]["operations"]]
    renamings = [at for at, done in enumerate(operations) if done == "replace"]
    assert operations[renamings[3] - 1] == operations[renamings[3] + 1] == "fsync"
    at = renamings[3] + {"fsync": -1, "replace": 0}.get(operation, 1)
    found = resumed(tmp_path, at + 1, options=BOTH[name])
    for part in ("module", "optimizer"):
        assert_same(found[part], whole[name][part], part)


def test_without_atomic_steps_a_kill_in_an_update_damages_the_run(tmp_path, whole):
    """Else the tests above would show nothing."""
    run_in_place = partial(run, options=BOTH["clipped"], atomic_step=False)
    (tmp_path / "whole").mkdir()
    assert in_child(partial(run_in_place, tmp_path / "whole", result=tmp_path / "result")) == 0
    operations = torch.load(tmp_path / "result")["operations"]
    # In the fourth step of six: blocks that were written before are of it, and the others are not.
    commits = [at for at, (name, _) in enumerate(operations) if name == "replace"]
    written = [
        at
        for at, (name, path) in enumerate(operations)
        if name == "write" and path == "00002.0.block" and commits[2] < at < commits[3]
    ]
    found = resumed(tmp_path, written[2], options=BOTH["clipped"], atomic_step=False)
    pairs = [(found["module"][name], value) for name, value in whole["clipped"]["module"].items()]
    assert not all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_step_whose_updates_wait_is_committed_in_the_next_forward(tmp_path):
    """With counters of all its updates; what looks at values, or the end, commits it before."""
    found = []

    def committed(trainer):
        record = read_record(trainer.strategy._engine.store.folder)
        found.append((trainer.global_step, record and record.step))

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            committed(trainer)
            if trainer.global_step == 3:
                trainer.strategy.lightning_module_state_dict()
                committed(trainer)

    options = {"gradient_clip_val": 0.5, "callbacks": [Look()], "max_steps": 4}
    data, module = points(), Regression()
    fit(tmp_path, module, data, small(), **options)
    assert found == [(0, None), (1, None), (2, 1), (3, 2), (3, 3)]
    payload = load_payload(tmp_path / "zero_infinity" / "rank00000", weights_only=False)
    states = payload["optimizer_states"][0]["state"]
    assert [int(state["step"]) for state in states.values()] == [4] * len(states)
    assert len(states) == len(list(module.parameters()))
