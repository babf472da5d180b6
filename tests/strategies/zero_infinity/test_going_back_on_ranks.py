"""Back in mid-fit on two ranks, each with its own sections of blocks: as under DDP, to the bit."""

from __future__ import annotations

import errno
import os
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from lightning_align import LISA, ExactResume, GaLoreAdamW, Muon, PretrainModule, StableAdamW
from lightning_align.callbacks.spikes import memory
from lightning_align.mapped import source_of
from lightning_align.offload import record
from lightning_align.offload.files import DirectFile
from lightning_align.run.capture import capture, restore
from lightning_align.strategies.zero_infinity.strategy import ZeROInfinityStrategy
from tests.helpers.offloaded import ADAMW, STEPS, Regression, assert_same, points, small, text
from tests.helpers.ranks import end_of_ranks, run_ranks
from tests.helpers.spiky import Told, rewinding
from tests.helpers.tiny_models import TINY_MODELS
from tests.strategies.zero_infinity.test_ranks import fit

SLOW = pytest.mark.slow


def state_of(trainer):
    """Parameters and optimizer state, on the first rank."""
    strategy = trainer.strategy
    if isinstance(strategy, ZeROInfinityStrategy):
        module = strategy.lightning_module_state_dict()
        found = module, strategy.optimizer_state(trainer.optimizers[0])
    else:
        found = trainer.lightning_module.state_dict(), trainer.optimizers[0].state_dict()
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, found)


def of_ranks(**arguments):
    return small(timeout=timedelta(seconds=60), **arguments)


def guarded(folder, rank, build, strategy, told, *alarms, more=None, has_lisa=False, **options):
    """What a run ends with, in which a guard raises its alarms."""
    module, data = build()
    lisa = [LISA(1, 3)] if has_lisa else []  # draws before the step of the alarm
    callbacks = [ExactResume(), *lisa, rewinding(*alarms, **(more or {})), told]
    trainer = fit(folder, rank, module, data, strategy, callbacks=callbacks, **options)
    found = state_of(trainer)
    if isinstance(trainer.strategy, ZeROInfinityStrategy):
        trainer.strategy.close()
    return found


def by_hand(optimizer=ADAMW):
    data = points(4, shuffle=True)
    return Regression(optimizer, width=48, schedule=True), data


def pretraining(optimizer=ADAMW, name="llama", count=2 * STEPS):
    module = PretrainModule(TINY_MODELS[name](), optimizer=optimizer)
    return module, text(count=count)


def long():
    """For windows of two batches."""
    return pretraining(count=4 * STEPS)


LR = {"lr_factor": 0.5, "lr_steps": 2}
IN_MEMORY = {"offload_params_device": "cpu", "offload_optimizer_device": "cpu"}


@pytest.mark.parametrize(
    ("build", "arguments", "more", "options"),
    [
        (by_hand, {}, {}, {}),
        pytest.param(by_hand, {"memory_limit": "10MB"}, {"moments": "reset"}, {}, marks=SLOW),
        pytest.param(by_hand, IN_MEMORY, LR, {}, marks=SLOW),
        pytest.param(by_hand, {"atomic_step": False}, {}, {}, marks=SLOW),
        pytest.param(long, {}, LR, {"accumulate_grad_batches": 2}, marks=SLOW),
        pytest.param(partial(pretraining, name="llama_tied"), {}, {}, {}, marks=SLOW),
        pytest.param(pretraining, {}, {}, {"has_lisa": True}, marks=SLOW),
    ],
)
def test_a_rewound_run_is_the_told_run_and_ddps(tmp_path, build, arguments, more, options):
    """Alarm at step 3, back to step 2: batches from there to the alarm are left out."""

    def run(rank):
        notes = Told()
        rewound, told, plain = (
            guarded(tmp_path / name, rank, build, strategy, leaves_out, *alarms, **rest)
            for name, strategy, leaves_out, alarms in (
                ("rewound", of_ranks(**arguments), notes, (3,)),
                ("told", of_ranks(**arguments), Told([[2 * w, 4 * w]]), ()),
                ("ddp", "ddp", Told(), (3,)),
            )
        )
        return rewound, told, plain, notes.ranges

    w = options.get("accumulate_grad_batches", 1)
    rest = {"more": more, **options}
    first, second = run_ranks(run, timeout_s=180)
    rewound, told, plain, ranges = first
    assert ranges == second[-1] == [[2 * w, 4 * w]]
    assert_same(rewound, plain)
    if not more:  # a told run has no rewind behind which it would lower or forget anything
        assert_same(rewound, told)


@SLOW
@pytest.mark.parametrize("optimizer", [Muon, GaLoreAdamW, StableAdamW])
def test_whole_matrices_go_back_as_if_told_what_to_leave_out(tmp_path, optimizer):
    def run(rank):
        build = partial(pretraining, partial(optimizer, lr=1e-3))
        rewound = guarded(tmp_path / "rewound", rank, build, of_ranks(), Told(), 3)
        return rewound, guarded(tmp_path / "told", rank, build, of_ranks(), Told([[2, 4]]))

    assert_same(*run_ranks(run, timeout_s=120)[0])


@SLOW
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("arguments", "options"), [({"tile_numel": 1024}, {}), ({}, {"precision": "bf16-true"})]
)
def test_tiles_and_masters_go_back_as_if_told_what_to_leave_out(tmp_path, arguments, options, size):
    def run(rank):
        build, rest = pretraining, {"size": size, **options}
        strategy = lambda: of_ranks(**arguments)  # noqa: E731
        rewound = guarded(tmp_path / "rewound", rank, build, strategy(), Told(), 3, **rest)
        told = guarded(tmp_path / "told", rank, build, strategy(), Told([[2, 4]]), **rest)
        return rewound, told

    assert_same(*run_ranks(run, size, timeout_s=120)[0])


class Back(pl.Callback):
    """Takes a state behind one batch, and goes back to it from behind others, twice."""

    def __init__(self, take, *back):
        self.take, self.back = take, list(back)
        self.state, self.messages, self.batches = None, [], 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        if self.state is None and batch_idx == self.take:
            messages = trainer.strategy.ranks._start
            trainer.strategy.ranks._start = self.noted(messages)
            self.state = capture(trainer)
            (states,) = self.state.checkpoint["optimizer_states"]
            assert states["parts"]
            assert all(source_of(part) is not None for part in states["parts"].values())
            trainer.strategy.ranks._start = messages
        elif batch_idx in self.back:  # once behind each
            self.back.remove(batch_idx)
            restore(trainer, self.state)

    def noted(self, start):
        def noting(call):
            self.messages.append(call)
            return start(call)

        return noting


@SLOW
@pytest.mark.parametrize(
    ("take", "back", "options"),
    [
        (1, (4, 3), {}),
        (2, (4, 5), {"accumulate_grad_batches": 2}),  # a window is open
        (2, (4,), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
    ],
)
def test_a_state_is_taken_and_gone_back_to(tmp_path, take, back, options):
    """Without a message; the run then comes to what one comes to that has never gone back."""

    def run(rank):
        ended = {}
        for name, callbacks in {"plain": [], "back": [Back(take, *back)]}.items():
            module, data = pretraining()
            rest = {"callbacks": [ExactResume(), *callbacks], **options}
            trainer = fit(tmp_path / name, rank, module, data, of_ranks(), **rest)
            ended[name] = state_of(trainer)
            trainer.strategy.close()
            if callbacks:
                again = sum(number - take for number in back)
                assert callbacks[0].batches == STEPS + again
                assert callbacks[0].messages == []
        return ended["back"], ended["plain"]

    assert_same(*run_ranks(run, timeout_s=120)[0])


# Faults


@SLOW
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["write", "room"])
def test_what_one_rank_cannot_do_ends_both(tmp_path, rank, what):
    """A write while a state is put back, and room for the snapshots before training."""

    def run(here):
        if here == rank and what == "room":
            full = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=1))
            vars(memory)["shutil"] = full
        alarmed = rewinding(3)
        if here == rank and what == "write":
            go_back = alarmed._go_back

            def failing(*args):
                DirectFile.write = fails
                go_back(*args)

            alarmed._go_back = failing
        module, data = by_hand()
        fit(tmp_path, here, module, data, of_ranks(), callbacks=[ExactResume(), alarmed])

    def fails(self, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.path))

    ended = end_of_ranks(run, 2, timeout_s=90)
    assert [end.exit_code for end in ended] == [1, 1]
    assert not any(end.stuck for end in ended)
    told = "Input/output error" if what == "write" else "snapshot(s) and a restore take"
    assert told in ended[rank].error
    assert f"rank {rank}" in ended[1 - rank].error


@SLOW
@pytest.mark.parametrize(("victim", "commit", "alarms"), [(0, 4, ()), (1, 4, ()), (1, 5, (3,))])
def test_a_kill_at_a_rewind_leaves_one_step(tmp_path, victim, commit, alarms):
    """The fourth commit is of step 2 again, behind that of step 3.

    A kill between that of one rank and that of the other leaves what was before the alarm; one in
    the next leaves what has gone back.
    """

    def train(rank, folder, ckpt_path=None, alarms=(), kill=False):
        replace, count = Path.replace, []

        def counted(path, target):
            if path.name == f"{record.FILE}.new":
                count.append(path)
                if len(count) == commit and rank == victim:
                    other = folder / "zero_infinity" / f"rank{1 - victim:05d}"
                    while record.read_record(other).number < commit:
                        time.sleep(0.01)
                    os.kill(os.getpid(), signal.SIGKILL)
            return replace(path, target)

        if kill:
            Path.replace = counted
        module, data = by_hand()
        callbacks = [ExactResume(), rewinding(*alarms)]
        trainer = fit(folder, rank, module, data, of_ranks(), ckpt_path, callbacks=callbacks)
        found = state_of(trainer)
        trainer.strategy.close()
        return found

    ended = end_of_ranks(partial(train, folder=tmp_path, alarms=(3,), kill=True), 2, 90)
    assert ended[victim].exit_code == -signal.SIGKILL
    folders = [tmp_path / "zero_infinity" / f"rank{rank:05d}" for rank in range(2)]
    steps = [record.read_record(folder).step for folder in folders]
    assert steps[victim] == (3 if commit == 4 else 2) == 5 - steps[1 - victim]
    ours = run_ranks(partial(train, folder=tmp_path, ckpt_path="last"), timeout_s=90)[0]
    theirs = run_ranks(partial(train, folder=tmp_path / "theirs", alarms=alarms), timeout_s=90)[0]
    assert_same(ours, theirs)
