"""Law: a run that rewinds goes on as one that was told before it began which batches to leave out.

To the bit, within an epoch and across its end: losses, logged values, weights, optimizer state,
attributes and metric objects.
"""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_align import (
    LISA,
    AsyncCheckpoint,
    GaLoreAdamW,
    Muon,
    PretrainModule,
    SpikeGuard,
    StableAdamW,
    TokenSchedule,
)
from lightning_align.run.position import batches_consumed
from tests.helpers.children import in_child
from tests.helpers.curriculum import by_length, linear
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.resume import SaveEveryBatch, SequenceData, gpt2_module
from tests.helpers.spiky import AlarmOnce, Told
from tests.laws.members import DATAMODULES, MODULES, Member
from tests.laws.runs import Outcome, Run
from tests.run.test_capture import Counts, Everything, Freezes, Parts, fit

pytestmark = pytest.mark.slow  # a minute in all; `make test-laws` runs them


def guard(*alarms: int, back: int = 1, every: int = 2, skip: int = 1, **more: Any) -> SpikeGuard:
    detector = AlarmOnce(*alarms)
    return SpikeGuard(
        action="rewind",
        detector=detector,
        rewind_steps=back,
        snapshot_every_n_steps=every,
        skip_batches=skip,
        **more,
    )


def as_told(
    build: Callable[[], Parts],
    *alarms: int,
    back: int = 1,
    skip: int = 1,
    window: int = 0,
    **options: Any,
) -> None:
    """The law, for snapshots every two steps."""

    def run(told: Told, guarding: SpikeGuard) -> list[str]:
        pl.seed_everything(3, verbose=False)
        module, callbacks, data = build()
        made = {name: each() if isinstance(each, type) else each for name, each in options.items()}
        return fit(module, *callbacks, guarding, told, data=data, **made)

    notes = Told()
    ours = run(notes, guard(*alarms, back=back, skip=skip))
    assert notes.ranges, "it has not gone back"
    theirs = run(Told(notes.ranges), guard(back=back, skip=skip))
    window = window or options.get("accumulate_grad_batches", 1)
    target = (alarms[-1] - back) // 2 * 2 * window  # the last rewind, and the batches behind it
    places = [line.split()[:2] for line in theirs]
    expected = theirs[places.index([str(target), "batch"]) + 1 :]
    assert len(ours) > len(theirs)
    for number, (one, other) in enumerate(zip(ours[-len(expected) :], expected, strict=True)):
        assert one == other, f"line {number} behind batch {target}, at {other.split()[:2]}"


def everything(loader: str = "shuffled", plateau: str = "") -> Parts:
    return Everything(loader, plateau), [Counts()], None


def ours(
    *callbacks: Callable[[], pl.Callback], num_workers: int = 0, optimizer: Any = None
) -> Parts:
    module: Any = gpt2_module(scheduler=not callbacks)
    if optimizer is not None:
        module = PretrainModule(module.model.config, optimizer=optimizer)
    return module, [make() for make in callbacks], SequenceData(num_workers)


# Dropout, attributes, BatchNorm, epoch means and torchmetrics objects are in ``Everything``.


@pytest.mark.parametrize("loader", ["shuffled", "workers", "stream", "stateful", "two"])
def test_any_module_with_any_loader(loader: str) -> None:
    as_told(lambda: everything(loader), 3)


@pytest.mark.parametrize("plateau", ["", "step", "epoch"])
def test_across_an_epochs_end_and_its_validation(plateau: str) -> None:
    """Epochs have six batches: to batch 4 of the first, from batch 2 of the second."""
    as_told(lambda: everything(plateau=plateau), 8, back=4)
    as_told(lambda: everything(plateau=plateau), 7, back=1)  # to the epoch's very end


class Decays(Everything):
    """With a schedule that is a function of its own count of steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        config = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def test_a_schedule_that_counts_steps() -> None:
    as_told(lambda: (Decays(), [], None), 3)


def test_what_hooks_of_an_epoch_have_set() -> None:
    def build() -> Parts:
        return Freezes(), [GradientAccumulationScheduler({0: 1, 1: 2})], None

    as_told(build, 6, back=2, window=1)  # from the second epoch into the first


def test_a_loss_scaler() -> None:
    def run(told: Told, guarding: SpikeGuard) -> tuple[list[str], dict[str, Any]]:
        scaler = torch.amp.GradScaler("cpu", 4.0, growth_interval=2)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        pl.seed_everything(3, verbose=False)
        return fit(everything()[0], guarding, told, plugins=[plugin])[-4:], scaler.state_dict()

    notes = Told()
    ours = run(notes, guard(3))
    assert ours == run(Told(notes.ranges), guard())


def test_two_rewinds_in_one_epoch_and_to_the_same_snapshot() -> None:
    as_told(everything, 3, 5)
    as_told(everything, 4, 4, back=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_our_module_accumulates_with_workers(num_workers: int) -> None:
    as_told(lambda: ours(num_workers=num_workers), 3, accumulate_grad_batches=2, max_epochs=2)


OPTIMIZERS = {
    "muon": lambda groups: Muon(groups, lr=0.01),
    "galore": lambda groups: GaLoreAdamW(groups, lr=0.01, rank=4, update_proj_gap=3),
    "stable_adamw": lambda groups: StableAdamW(groups, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_of_ours(optimizer: Any) -> None:
    as_told(lambda: ours(optimizer=optimizer), 5, max_epochs=1)


def lisa() -> pl.Callback:
    return LISA(activated_layers=1, interval_steps=3, reactivation_warmup_steps=2, filename=None)


def test_lisa_in_mid_interval() -> None:
    as_told(lambda: ours(lisa), 7, back=3, max_epochs=1)  # to step 4; draws change at 3 and 6


@pytest.mark.parametrize("mode", ["truncate", "reshape"])
def test_rows_of_a_curriculum(mode: str) -> None:
    """Back over a change of length: batch n has the rows that it had the first time."""

    def growing() -> pl.Callback:
        return by_length(mode, linear(total=9))

    as_told(lambda: ours(growing), 5, back=3, max_epochs=1)


def test_token_schedule() -> None:
    as_told(lambda: ours(lambda: TokenSchedule(3000, warmup_tokens=500)), 5, max_epochs=1)


def test_snapshots_change_nothing() -> None:
    """Without an alarm the run is the one without a guard."""

    def run(*guarding: pl.Callback) -> list[str]:
        pl.seed_everything(3, verbose=False)
        module, callbacks, _ = everything("workers")
        return fit(module, *callbacks, *guarding, accumulate_grad_batches=2)

    assert run(guard(every=1)) == run()


@pytest.mark.parametrize("build", [everything, ours], ids=["any", "ours"])
def test_on_two_ranks(build: Callable[[], Parts]) -> None:
    def on(rank: int) -> None:
        ranks = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        as_told(build, 3, max_epochs=3, **ranks)

    run_ranks(on, timeout_s=120.0)


@pytest.mark.parametrize(
    "build",
    [
        partial(ours, optimizer=partial(torch.optim.AdamW, lr=1e-2)),
        partial(ours, optimizer=partial(Muon, lr=1e-2)),
        partial(ours, optimizer=partial(StableAdamW, lr=1e-2)),
        partial(ours, optimizer=partial(GaLoreAdamW, lr=1e-2, rank=2, update_proj_gap=2)),
        partial(ours, partial(LISA, activated_layers=1, interval_steps=2, filename=None)),
    ],
    ids=["AdamW", "Muon", "StableAdamW", "GaLoreAdamW", "LISA"],
)
def test_on_two_ranks_that_each_have_a_part_of_every_parameter(build: Callable[[], Parts]) -> None:
    def on(rank: int) -> None:
        ranks = {"devices": 2, "plugins": [ForkedRanks(rank, 2)]}
        as_told(build, 3, strategy=ModelParallelStrategy, **ranks)

    run_ranks(on, timeout_s=120.0)


@pytest.mark.parametrize("data", DATAMODULES, ids=str)
def test_datamodules_of_ours(data: Member, tmp_path: Path, material: Path) -> None:
    module = next(each for each in MODULES if each.batches == data.batches)
    run = Run(module, data)

    def outcome(name: str, told: Told, guarding: SpikeGuard) -> Outcome:
        (tmp_path / name).mkdir()
        return run.fit(tmp_path / name, material, extra=[guarding, told])

    notes = Told()
    ours = outcome("ours", notes, guard(3))
    assert notes.ranges
    assert ours == outcome("theirs", Told(notes.ranges), guard())


# A kill right after a rewind


class KillAfter(pl.Callback):
    """SIGKILL to this process, so many batches after it has gone back."""

    def __init__(self, batches: int) -> None:
        self.left, self.latest, self.is_back = batches, -1, False

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        position = batches_consumed(trainer)
        self.is_back |= position <= self.latest
        self.latest = position
        if self.is_back and self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= self.is_back


@pytest.mark.parametrize(
    ("batches", "newest", "alarms"),
    [(0, 2, ()), (2, 4, ()), (0, 1, (3,))],
    ids=["with the rewind in it", "behind it", "before it, so that it comes again"],
)
def test_a_kill_behind_a_rewind(
    tmp_path: Path, batches: int, newest: int, alarms: tuple[int, ...]
) -> None:
    """What is saved behind the guard in the same hook is of the run that has gone back."""

    def run(guarding: SpikeGuard, *last: pl.Callback, ckpt_path: Any = None) -> list[str]:
        pl.seed_everything(3, verbose=False)
        module, callbacks, _ = everything()
        options = {"default_root_dir": tmp_path, "ckpt_path": ckpt_path}
        return fit(module, *callbacks, guarding, *last, **options)

    whole = run(guard(3))
    code = in_child(lambda: run(guard(3), SaveEveryBatch(), KillAfter(batches)))
    assert code == -signal.SIGKILL
    resumed = run(guard(*alarms), ckpt_path=tmp_path / f"batch={newest}.ckpt")
    again = max(number for number, line in enumerate(whole) if line.startswith("3 batch"))
    later = [line for line in whole[again:] if int(line.split()[0]) > newest]
    assert later == resumed[-len(later) :]
    assert len(resumed) == len(later) + (3 if alarms else 0)  # batch 2, 3, and 4 once more


def test_a_kill_behind_a_rewind_is_resumed_from_last(tmp_path: Path) -> None:
    """Steps 1 to 3 were saved when the run goes back to 2: the way back is newer than step 3."""
    dirpath = tmp_path / "checkpoints"

    def run(guarding: SpikeGuard, *more: pl.Callback, ckpt_path: Any = None) -> list[str]:
        pl.seed_everything(3, verbose=False)
        module, callbacks, _ = everything()
        options = {"default_root_dir": tmp_path, "enable_checkpointing": bool(more)}
        return fit(module, *callbacks, guarding, *more, ckpt_path=ckpt_path, **options)

    def every_step() -> AsyncCheckpoint:
        return AsyncCheckpoint(dirpath, "{step}", every_n_train_steps=1, save_top_k=-1)

    class KillOnceWritten(KillAfter):
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            trainer.checkpoint_callback._folder.wait(None)
            super().on_train_batch_start(trainer, *rest)

    whole = run(guard(3))
    assert in_child(lambda: run(guard(3), KillOnceWritten(0), every_step())) == -signal.SIGKILL
    resumed = run(guard(), every_step(), ckpt_path="last")
    again = max(number for number, line in enumerate(whole) if line.startswith("3 batch"))
    assert resumed == whole[again:]
