"""Rewinding: how far, what is lowered and reset behind it, what loggers see, what is refused.

That the run then is one that was told what to leave out is tests/laws/test_rewind.py.
"""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from lightning_align import GaLoreAdamW, Muon, SpikeGuard, StableAdamW
from lightning_align.callbacks.spikes import memory
from lightning_align.callbacks.spikes.rewind import SpikeRewind, forget_moments
from lightning_align.host_block import HostBlock
from lightning_align.run.skipping import skipped_batches
from lightning_align.stability import SpikeDetector, SpikeVerdict
from tests.helpers.spiky import Regression, Told, batches


class AlarmAtBatches(SpikeDetector):
    """Raises an alarm each time that a loss is large, as a bad batch's is."""

    def update(self, step: int, loss: float, grad_norm: float | None = None) -> SpikeVerdict:
        reason = "large" if loss > 1e3 else ""
        return SpikeVerdict(step, bool(reason), reason, loss, grad_norm)


class Watch(pl.Callback):
    """After each batch: step, learning rate, lines of loggers; what is left out in the end."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rates: list[float] = []
        self.lines: list[int] = []
        self.left_out: Any = None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.steps.append(trainer.global_step)
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))
        self.lines.append(trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.left_out = skipped_batches(trainer).plain()


def guard(action: Any = "rewind", **options: Any) -> SpikeGuard:
    settings = {"rewind_steps": 1, "snapshot_every_n_steps": 2, "skip_batches": 1, **options}
    return SpikeGuard(action=action, detector=AlarmAtBatches(), **settings)


def fit(module: Any, guarding: Any, data: Any, *more: pl.Callback, **options: Any) -> Watch:
    """A run of one epoch that a callback watches, before the guard has its turn."""
    watch, ckpt_path = Watch(), options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, guarding, *more],
        **{"max_epochs": 1, "logger": False, "log_every_n_steps": 1, **options},
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return watch


def loader(count: int, **factors: float) -> Any:
    return DataLoader(batches(count, **factors), batch_size=None)


# How far


def test_it_goes_to_the_newest_snapshot_that_is_old_enough() -> None:
    """Bad is batch 7, before step 8: two steps back is 5, and the snapshot before it is of 4."""
    watch = fit(Regression(), guard(rewind_steps=2, skip_batches=2), loader(14, at7=1e6))
    assert watch.steps == [1, 2, 3, 4, 5, 6, 7, 8, *range(5, 15)]
    assert watch.left_out == [[4, 10]]


def test_snapshots_of_a_stretch_that_was_left_are_not_gone_back_to() -> None:
    """Bad are 7, before step 8, and 13, before step 10, when step 6 has a snapshot for the second
    time: its next batch was 6, and is 10."""
    data = loader(24, at7=1e6, at13=1e6)
    ours, theirs = Regression(), Regression()
    watch = fit(ours, guard(rewind_steps=3, skip_batches=0), data, max_steps=14)
    assert watch.steps == [*range(1, 9), *range(5, 11), *range(7, 15)]
    assert watch.left_out == [[4, 8], [10, 14]]
    fit(theirs, guard(), data, Told(watch.left_out), max_steps=14)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_where_no_snapshot_is_old_enough_the_step_is_skipped() -> None:
    guarding = guard(rewind_steps=4)
    with pytest.warns(UserWarning, match=r"step 4: No snapshot is old enough yet: the step was"):
        watch = fit(Regression(), guarding, loader(8, at4=1e6))
    assert watch.steps == list(range(1, 9))
    assert watch.left_out == []
    (incident,) = guarding.report.incidents
    assert (incident.action, len(incident.notes)) == ("skip", 1)


def test_after_so_many_rewinds_at_one_place_training_ends() -> None:
    """Where the guard stands on its ladder does not go back with the run."""
    guarding, bad = guard(skip_batches=0, max_rewinds=2), range(7, 16)
    with pytest.warns(UserWarning, match="Rewind 2 at this place: other batches led to it as well"):
        fit(Regression(), guarding, loader(30, **{f"at{number}": 1e6 for number in bad}))
    incidents = guarding.report.incidents
    assert [incident.action for incident in incidents] == ["rewind", "rewind", "stop"]
    assert [len(incident.notes) for incident in incidents] == [0, 1, 0]


def test_snapshots_are_taken_of_steps_and_not_of_batches() -> None:
    watch = fit(
        Regression(),
        guard(skip_batches=0),
        loader(18, at10=1e6),
        accumulate_grad_batches=2,
    )
    assert watch.steps[9:13] == [5, 5, 6, 4]
    assert watch.left_out == [[8, 12]]


def test_snapshots_lie_in_memory_that_is_taken_once(monkeypatch: Any) -> None:
    taken: list[int] = []
    make = HostBlock.__init__

    def counted(self: Any, nbytes: int, pinned: bool) -> None:
        taken.append(nbytes)
        make(self, nbytes, pinned)

    monkeypatch.setattr(HostBlock, "__init__", counted)
    guarding = guard(rewind_steps=3, snapshot_every_n_steps=1)
    fit(Regression(), guarding, loader(16, at9=1e6), max_steps=12)
    assert len(taken) == 4  # the first snapshot is behind a step: the state does not grow


# Behind it


class Scheduled(Regression):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        config = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Rates(torch.optim.SGD):
    """Notes the learning rates that its steps were taken with."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.used: list[float] = []

    def step(self, closure: Any = None) -> Any:
        result = closure()
        self.used.append(float(self.param_groups[0]["lr"]))
        super().step()
        return result


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_the_learning_rate_of_steps_is_lower_and_no_scheduler_sees_it(lr: Any) -> None:
    schedule = [float(lr) * 0.9**step for step in range(12)]
    module = Scheduled(optimizer=Rates, lr=lr)
    watch = fit(module, guard(lr_factor=0.5, lr_steps=3), loader(12, at5=1e6))
    (optimizer,) = [module.optimizers(use_pl_optimizer=False)]
    factors = [1] * 6 + [0.5] * 3 + [1] * 5  # of steps 0 to 5, then 4 to 6, then 7 to 11
    steps = [*range(6), *range(4, 12)]
    expected = [schedule[step] * factor for step, factor in zip(steps, factors, strict=True)]
    # Tensors are fp32, of which products are rounded in another order.
    assert optimizer.used == pytest.approx(expected, rel=1e-6)
    assert watch.rates == pytest.approx([schedule[step] * 0.9 for step in steps], rel=1e-6)


def test_a_step_that_fails_leaves_the_learning_rate_that_it_had() -> None:
    class Fails(Rates):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if len(self.used) == 8:
                raise RuntimeError("told to")

    module = Regression(optimizer=Fails)
    with pytest.raises(RuntimeError, match="told to"):
        fit(module, guard(lr_factor=0.5, lr_steps=5), loader(12, at5=1e6))
    (optimizer,) = [module.optimizers(use_pl_optimizer=False)]
    assert optimizer.used[-1] == 0.5 * optimizer.param_groups[0]["lr"]


def test_a_resumed_run_goes_on_with_the_lower_learning_rate(tmp_path: Path) -> None:
    class Saves(pl.Callback):
        left = 1

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5 and len(trainer.optimizers[0].used) > 5:
                trainer.save_checkpoint(tmp_path / "ckpt")

    options = {"lr_factor": 0.5, "lr_steps": 3}
    whole, resumed = Regression(optimizer=Rates), Regression(optimizer=Rates)
    fit(whole, guard(**options), loader(12, at5=1e6), Saves())
    fit(resumed, guard(**options), loader(12, at5=1e6), ckpt_path=tmp_path / "ckpt")
    used = [each.optimizers(use_pl_optimizer=False).used for each in (whole, resumed)]
    assert used[1] == used[0][-7:] == [0.005] * 2 + [0.01] * 5
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "muon": Muon,
    "galore": lambda params, lr: GaLoreAdamW(
        [{"params": [p], "rank": 1 if p.ndim == 2 and len(p) > 1 else None} for p in params],
        lr=lr,
        update_proj_gap=2,
    ),
    "stable_adamw": StableAdamW,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Muon. parameters came without use_muon")
def test_moments_are_those_of_a_fresh_optimizer(make: Any) -> None:
    """The first step behind the reset is that of an optimizer which has not stepped before."""

    class Resets(pl.Callback):
        before: Any = None

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                forget_moments(trainer)
                self.before = [p.detach().clone() for p in pl_module.parameters()]

    module, resets, data = Regression(optimizer=make), Resets(), batches(4)
    fit(module, pl.Callback(), DataLoader(data, batch_size=None), resets)
    fresh = Regression(optimizer=make)
    with torch.no_grad():
        for parameter, value in zip(fresh.parameters(), resets.before, strict=True):
            parameter.copy_(value)
    fit(fresh, pl.Callback(), DataLoader(data[3:], batch_size=None))
    assert all(map(torch.equal, module.parameters(), fresh.parameters()))


def test_a_rewind_resets_moments_where_that_is_asked_for() -> None:
    class Counts(pl.Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            states = trainer.optimizers[0].state.values()
            self.steps.append(max((int(state["step"]) for state in states), default=0))

    for moments, expected in (("keep", 4), ("reset", 0)):
        counts = Counts()
        fit(Regression(), guard(moments=moments), loader(10, at5=1e6), counts)
        assert counts.steps[:7] == [0, 1, 2, 3, 4, 5, expected]


# Loggers


class Lines(DummyLogger):
    """Keeps the number of each line, as W&B would drop one that goes back."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def log_metrics(self, *args: Any, step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        self.numbers.append(step)


def test_the_numbers_of_lines_never_go_back(tmp_path: Path) -> None:
    class Logs(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=True, on_epoch=True, batch_size=1)
            return loss

    lines, written = Lines(), CSVLogger(tmp_path)
    watch = fit(
        Logs(),
        guard(),
        loader(9, at5=1e6),
        pl.callbacks.LearningRateMonitor(),
        max_epochs=2,
        logger=[lines, written],
    )
    assert watch.steps[4:8] == [5, 6, 5, 6]
    assert lines.numbers == sorted(lines.numbers)
    rows = Path(written.log_dir, "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("step")
    numbers = [int(row.split(",")[column]) for row in rows[1:]]
    assert numbers == sorted(numbers)
    assert watch.lines == list(range(len(watch.lines)))
    assert numbers[-1] == watch.lines[-1]


# Refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewind_steps": -1}, r"SpikeGuard\(rewind_steps=-1\): must be at least 0"),
        ({"skip_batches": -1}, r"SpikeGuard\(skip_batches=-1\): must be at least 0"),
        ({"snapshot_every_n_steps": 0}, r"\(snapshot_every_n_steps=0\): must be at least 1"),
        ({"rewind_steps": 1e2}, r"\(rewind_steps=100.0\): must be a whole number"),
        ({"skip_batches": 1.5}, r"\(skip_batches=1.5\): must be a whole number"),
        ({"moments": "drop"}, r"\(moments='drop'\): must be one of 'keep', 'reset'"),
        ({"lr_factor": 0.0, "lr_steps": 1}, r"\(lr_factor=0.0\): must be a number in \(0, 1\]"),
        ({"lr_factor": 2, "lr_steps": 1}, r"\(lr_factor=2\): must be a number in \(0, 1\]"),
        ({"lr_factor": 0.5, "lr_steps": 0}, r"\(lr_steps=0\): says for how many steps"),
        ({"snapshots": 3}, r"\(rewind_steps=21\): 3 snapshot\(s\), one every 10 steps, reach 20"),
    ],
    ids=str,
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    usual = {"rewind_steps": 21, "snapshot_every_n_steps": 10}
    with pytest.raises(ValueError, match=message):
        SpikeRewind(**{**usual, **arguments})


def test_as_many_snapshots_are_kept_as_the_way_back_needs() -> None:
    kept = {back: SpikeRewind(back, 10).snapshots for back in (0, 1, 10, 11, 20, 21)}
    assert kept == {0: 1, 1: 2, 10: 2, 11: 3, 20: 3, 21: 4}
    for every in (1, 2, 3, 7):
        for back in range(20):
            for complete in range(back + every, 60):
                held = sorted(range(complete - complete % every, 0, -every))
                held = held[-SpikeRewind(back, every).snapshots :]
                assert any(step <= complete - back for step in held)


class Reloads(Regression):
    def train_dataloader(self) -> Any:
        return loader(4)


def test_what_cannot_go_back_is_refused_at_set_up(monkeypatch: Any) -> None:
    def refusal(module: Any = None, data: Any = None, **options: Any) -> str:
        with pytest.raises(ValueError, match=r"^SpikeGuard\(") as raised:
            fit(module or Regression(), guard(), data, **options)
        return str(raised.value)

    assert "(rewind_steps=1): the run has 1 steps" in refusal(None, loader(4), max_steps=1)
    every = {"reload_dataloaders_every_n_epochs": 1}
    assert "makes new loaders" in refusal(Reloads(), None, **every)
    assert "(train_dataloader='generator'): an iterator cannot be begun anew" in refusal(
        None, (batch for batch in batches(4))
    )
    averages = pl.callbacks.StochasticWeightAveraging(1e-3)
    with pytest.raises(ValueError, match=r"SpikeGuard\(callbacks='StochasticWeightAveraging'\)"):
        fit(Regression(), guard(), loader(4), averages)
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert "(snapshots=2): 2 snapshot(s) and a restore take 1,764 bytes" in refusal(None, loader(4))


def test_a_snapshot_that_is_larger_than_foreseen_is_refused_while_there_is_one(
    monkeypatch: Any,
) -> None:
    class Averages(Regression):
        def on_train_start(self) -> None:
            self.average = torch.zeros(1000)

    monkeypatch.setattr(memory, "available_memory", lambda: 13_000)
    with pytest.raises(ValueError, match=r"\(snapshots=3\): 3 snap.* take 1[89],\d+ bytes of host"):
        fit(Averages(), guard(rewind_steps=3), loader(8))


def test_the_bytes_of_snapshots_are_said_once_where_they_hardly_grow(caplog: Any) -> None:
    class Counts(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("large", torch.zeros(10_000))
            self.seen = ""

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.seen += "a few bytes more"

    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(Counts(), guard(rewind_steps=3), loader(8))
    assert caplog.text.count("snapshot(s) are kept") == 1


def test_without_the_action_nothing_is_kept_and_nothing_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    module = Reloads()
    watch = fit(module, guard("skip"), None, reload_dataloaders_every_n_epochs=1)
    assert watch.steps == [1, 2, 3, 4]
