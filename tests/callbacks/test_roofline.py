"""RooflineMonitor: the run's own steps are analysed, to the same bits; what is told of them."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy

from lightning_align import MachineBalance, RooflineMonitor
from lightning_align.planner.trace import IS_TRACING
from tests.helpers.recorder import trainer as quiet_trainer
from tests.helpers.resume import (
    VOCABULARY,
    HandWritten,
    SequenceData,
    Sequences,
    weights_hash,
)

# Of a batch of 4 rows with 12 tokens to predict: the first Linear and the head.
FORWARD = 2 * 4 * 12 * (16 * 32 + 32 * VOCABULARY)
MACHINE = MachineBalance("m", peak_flops=1e9, mem_bandwidth=1e8, overheads={None: 1e-6})


def fit(folder: Path, *callbacks: pl.Callback, module: Any = None, **options: Any) -> Any:
    pl.seed_everything(5, verbose=False)
    module = HandWritten() if module is None else module
    options = {
        "max_steps": -1,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        **options,
    }
    trainer = quiet_trainer(str(folder), callbacks=list(callbacks), **options)
    trainer.fit(module, SequenceData())
    return trainer


def monitor(**options: Any) -> RooflineMonitor:
    return RooflineMonitor(**{"hardware": MACHINE, "plot": False, **options})


class Analyses(RooflineMonitor):
    """Notes what each analysis came to."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"hardware": MACHINE, "plot": False, **options})
        self.found: list[tuple[int, int]] = []  # number of the step, FLOPs

    def _finish_analysis(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super()._finish_analysis(trainer, pl_module)
        assert self.report is not None
        self.found.append((trainer.global_step, self.report.total_flops))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_with_and_without_it_training_is_the_same_bits(tmp_path: Path, accumulate: int) -> None:
    runs = [
        fit(tmp_path, *callbacks, accumulate_grad_batches=accumulate, gradient_clip_val=0.1)
        for callbacks in ([Analyses(every_n_steps=1)], [])
    ]
    ours, theirs = (weights_hash(run.lightning_module) for run in runs)
    assert ours == theirs
    assert len(runs[0].callbacks[0].found) >= 6


def test_a_window_of_accumulation_is_a_step(tmp_path: Path) -> None:
    """10 batches, the last one of 2 rows: windows of 3, 3, 3 and 1 batches."""
    seen = Analyses(every_n_steps=1)
    fit(tmp_path, seen, accumulate_grad_batches=3, max_epochs=1, limit_val_batches=0)
    batch = 3 * FORWARD  # backward has two products for one of forward
    assert seen.found == [(2, 3 * batch), (3, 3 * batch), (4, batch // 2)]
    assert seen.report is not None
    assert seen.report.modules["head"].flops == 3 * 2 * 2 * 12 * 32 * VOCABULARY


def test_the_second_step_is_analysed_and_then_every_so_many(tmp_path: Path) -> None:
    seen = Analyses(every_n_steps=4)
    fit(tmp_path, seen, max_epochs=1)
    assert [step for step, _ in seen.found] == [2, 6, 10]


class Changes(pl.Callback):
    """Says that something else trains from batch 3 on."""

    def planned_change(self, position: int) -> str | None:
        return "another" if position == 3 else None


def test_what_trains_has_changed_and_is_analysed_anew(tmp_path: Path) -> None:
    seen = Analyses(every_n_steps=20)
    fit(tmp_path, seen, Changes(), max_epochs=1)
    assert [step for step, _ in seen.found] == [2, 5]


class ChangesOften(pl.Callback):
    """Something else trains from each other batch on."""

    def planned_change(self, position: int) -> str | None:
        return None if position % 2 else "another"


def test_tables_come_as_often_as_without_changes(tmp_path: Path) -> None:
    """Analysed are steps 2, 4, 6, 8 and 10; four steps apart there is a table."""
    seen = Analyses(every_n_steps=4)
    fit(tmp_path, seen, ChangesOften(), max_epochs=1)
    assert [step for step, _ in seen.found] == [2, 4, 6, 8, 10]
    lines = (tmp_path / "roofline.jsonl").read_text().splitlines()
    assert sum('"module": "head"' in line for line in lines) == 3


def test_what_is_logged(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path), flush_logs_every_n_steps=1)
    callback = monitor(every_n_steps=3, available_flops=2e9)
    fit(tmp_path, callback, logger=logger, max_epochs=1)
    values = callback.values
    assert callback.report is not None
    flops_s = callback.report.model_flops / values["step_s"]
    assert values["mfu"] == pytest.approx(flops_s / 2e9)
    assert values["hfu"] == values["mfu"]  # nothing is computed again
    assert sum(v for k, v in values.items() if k.endswith("_share")) == pytest.approx(1)
    assert values["tokens_per_s"] > 0
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "roofline/mfu" in text
    assert "roofline/backward_share" in text
    assert '"module": "head"' in (tmp_path / "roofline.jsonl").read_text()


def test_the_roofline_is_drawn(tmp_path: Path) -> None:
    fit(tmp_path, monitor(plot=True), max_epochs=1, limit_train_batches=3)
    assert (tmp_path / "roofline.png").stat().st_size > 1000


def test_advice_comes_at_the_end_most_first(tmp_path: Path) -> None:
    """Calls cost a thousand times what they do, so that twice the rows nearly double the speed."""
    slow = MachineBalance("m", 1e12, 1e12, overheads={None: 1e-3})
    callback = monitor(hardware=slow)
    fit(tmp_path, callback, max_epochs=1)
    gains = [each.gain for each in callback.advice]
    assert gains == sorted(gains, reverse=True)
    assert "fused optimizer" in [each.name for each in callback.advice]
    larger = next(each for each in callback.advice if each.name == "larger micro-batch")
    assert larger.gain == pytest.approx(1, abs=0.01)


class Fails(HandWritten):
    """Whose second step fails."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == 1:
            raise RuntimeError("no second step")
        return super().training_step(batch, batch_idx)


def test_after_an_exception_nothing_is_wrapped_any_longer(tmp_path: Path) -> None:
    callback = monitor()
    with pytest.raises(RuntimeError, match="no second step"):
        fit(tmp_path, callback, module=Fails())
    assert not IS_TRACING.get()
    assert not callback._undo
    fit(tmp_path, callback, max_epochs=1)
    assert callback.report is not None


class Manual(HandWritten):
    """Which optimizes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_what_cannot_be_analysed_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it optimizes manually"):
        fit(tmp_path, monitor(), module=Manual())
    with pytest.raises(ValueError, match="the Trainer has 2 of them"):
        fit(tmp_path, monitor(), Analyses())


def test_a_strategy_whose_steps_are_not_whole_is_refused() -> None:
    module = HandWritten()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer._accelerator_connector.strategy = FSDPStrategy(
        parallel_devices=[torch.device("cpu")], accelerator=trainer.accelerator
    )
    with pytest.raises(ValueError, match="its ranks hold parts of a model"):
        monitor().setup(trainer, module, "fit")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0.*at least 1"),
        ({"every_n_steps": 1.5}, "must be a whole number"),
        ({"top_k": 0}, "top_k=0.*at least 1"),
        ({"available_flops": float("nan")}, "positive, finite number"),
        ({"hardware": "h10"}, "Did you mean 'h100-sxm'"),
        ({"hardware": 7}, "or a MachineBalance"),
        ({"hardware": "h100-sxm", "available_flops": 1979e12}, "sparse matrices"),
    ],
)
def test_bad_arguments(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        RooflineMonitor(**options)


class Counts(RooflineMonitor):
    """Notes of how many steps, and of how many tokens, times are."""

    def _log_values(self, trainer: pl.Trainer) -> None:
        self.counted = self._counted
        super()._log_values(trainer)


def test_the_first_step_and_what_is_analysed_are_not_timed(tmp_path: Path) -> None:
    """Of steps 1 to 9 the first, and 2, 5 and 8: five are left, of 4 rows with 13 tokens."""
    counts = Counts(every_n_steps=3, hardware=MACHINE, plot=False)
    fit(tmp_path, counts, max_steps=9, max_epochs=-1, log_every_n_steps=50)
    assert counts.counted == 5
    tokens = counts.values["tokens_per_s"] * 5 * counts.values["step_s"]
    assert tokens == pytest.approx(5 * 4 * 13)


class Sparse(HandWritten):
    """Whose embedding has sparse gradients."""

    def __init__(self) -> None:
        super().__init__(scheduler=False)
        self.embedding.sparse = True

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Transforms(HandWritten):
    """With a penalty on a slope, which refuses hooks of saved tensors."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        slope = torch.func.grad(lambda bias: bias.exp().sum())(self.head.bias)
        return super().training_step(batch, batch_idx) + 0.1 * slope.square().sum()


class Clips(HandWritten):
    """In its own way."""

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad.clamp_(-1e-3, 1e-3)


class Closures(HandWritten):
    """Whose optimizer runs several forwards and backwards a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Recovers(HandWritten):
    """From an exception inside of a module."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            self.body(torch.ones(2, 3))
        return super().training_step(batch, batch_idx)


class Skips(HandWritten):
    """A batch."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        if batch_idx == 4 and self.training:
            return None
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Sparse, Transforms, Clips, Closures, Recovers, Skips])
def test_whatever_a_step_does_it_comes_to_the_same_bits(
    tmp_path: Path, kind: type[HandWritten]
) -> None:
    hashes, seen = [], Analyses(every_n_steps=1)
    for callbacks in ([seen], []):
        pl.seed_everything(5, verbose=False)
        run = fit(tmp_path, *callbacks, module=kind(), max_epochs=1)
        hashes.append(weights_hash(run.lightning_module))
    assert hashes[0] == hashes[1]
    assert len(seen.found) == 9


@pytest.fixture
def slow_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch takes 50 ms."""
    theirs = Sequences.__getitem__

    def slow(self: Sequences, indices: Any) -> Any:
        time.sleep(0.05)
        return theirs(self, indices)

    monkeypatch.setattr(Sequences, "__getitem__", slow)


class Data(RooflineMonitor):
    """Notes how long data took of the steps that are timed, and how many these are."""

    def _log_values(self, trainer: pl.Trainer) -> None:
        self.data = self._clock.split["data"], self._counted
        super()._log_values(trainer)


def test_data_of_a_step_that_is_analysed_is_not_timed_either(
    tmp_path: Path, slow_to_load: None
) -> None:
    """Of steps 1 to 9 those with odd numbers are, but for the first."""
    data = Data(every_n_steps=2, hardware=MACHINE, plot=False)
    options: dict[str, Any] = {"max_steps": 9, "max_epochs": -1, "log_every_n_steps": 50}
    fit(tmp_path, data, **options)
    seconds, steps = data.data
    assert steps == 4
    assert 4 * 0.05 <= seconds < 6 * 0.05


class Writes(pl.Callback):
    """Something behind each batch, as of a checkpoint."""

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.05)


def test_what_callbacks_do_between_batches_is_no_loading_of_data(tmp_path: Path) -> None:
    callback = monitor()
    fit(tmp_path, callback, Writes(), max_epochs=1, limit_train_batches=6, log_every_n_steps=6)
    assert callback.values["other_share"] > 0.5
    assert callback.values["data_share"] < 0.1


def test_validation_within_a_window_that_is_analysed_starts_no_clock(tmp_path: Path) -> None:
    parts = []

    class Notes(Analyses):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_validation_end(trainer, pl_module)
            parts.append((self._trace is not None, self._clock.part))

    often = {"accumulate_grad_batches": 3, "val_check_interval": 1, "limit_val_batches": 1}
    fit(tmp_path, Notes(every_n_steps=2), max_epochs=1, **often)
    assert set(parts) == {(True, None), (False, "other")}


class AsOnADevice(RooflineMonitor):
    """Whose parts are told apart only before values are logged."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._clock.splits = self._clock.always_splits = False


def test_advice_at_the_end_knows_what_was_measured_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_to_load: None
) -> None:
    """The run ends three steps after values were logged, and these steps are not split."""
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: None)
    callback = AsOnADevice(hardware=MACHINE, plot=False)
    fit(tmp_path, callback, max_steps=9, max_epochs=-1, log_every_n_steps=6)
    assert callback.values["data_share"] > 0.5
    assert "more workers" in [each.name for each in callback.advice]


class Broken(CSVLogger):
    """A logger whose server is gone."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(name.startswith("roofline/") for name in metrics):
            raise ConnectionError("no server")

    def log_table(self, **_: Any) -> None:
        raise ConnectionError("no server")

    log_image = log_table


def test_a_logger_that_fails_ends_no_run(tmp_path: Path) -> None:
    callback = monitor(plot=True)
    with pytest.warns(UserWarning, match=r"not logged \(ConnectionError: no server\)"):
        run = fit(tmp_path, callback, logger=Broken(str(tmp_path)), max_epochs=1)
    assert run.global_step == 10
    assert callback.advice


def test_files_that_cannot_be_written_end_no_run(tmp_path: Path) -> None:
    (tmp_path / "roofline.jsonl").mkdir()
    (tmp_path / "roofline.png").mkdir()
    with pytest.warns(UserWarning, match="was not written"):
        run = fit(tmp_path, monitor(plot=True), max_epochs=1)
    assert run.global_step == 10
