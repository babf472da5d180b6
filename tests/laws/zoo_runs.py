"""Runs of one member of the zoo: plain Lightning's, one with our callbacks, and its resumes."""

import logging
import math
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy

from lightning_align import (
    AsyncCheckpoint,
    ExactResume,
    MetricPlot,
    PipelineStrategy,
    TokenSchedule,
    ZeROInfinityStrategy,
)
from lightning_align.run.position import batches_consumed
from lightning_align.run.replicas import replica
from lightning_align.run.rng import reseed
from tests.helpers.foreign import consumed_in
from tests.helpers.ranks import ForkedRanks, end_of_ranks, run_ranks
from tests.helpers.read_checkpoint import read_checkpoint
from tests.laws.zoo import Row

SEED = 7
ALONE = ("auto", "zero_infinity")  # in one process
MIDDLE = 3  # batches: in mid-epoch, in the middle of a window of two, behind a validation
OURS = (
    lambda folder: ExactResume(),
    lambda folder: AsyncCheckpoint(folder, every_n_train_steps=3, save_top_k=-1),
    lambda folder: MetricPlot(metrics=["train_loss", "val_loss"]),
)
LOGGED_BY_US = ("checkpoint/", "lr", "tokens_seen", "zero_infinity/")
# Neutral, for its learning rate is always the one that the optimizer was built with.
OF_TOKENS = (lambda folder: TokenSchedule(max_tokens=10**6, schedule="constant"),)


@dataclass
class Record:
    """What a run came to, in plain numbers.

    Attributes:
        events: (batches consumed, what, name -> value): losses, logged metrics, learning rates.
        weights: Final parameters and buffers.
        error: What it raised, "" for nothing.
        warned: Texts of its warnings.
    """

    events: list[tuple[int, str, dict[str, float]]] = field(default_factory=list, repr=False)
    weights: dict[str, list[float]] = field(default_factory=dict, repr=False)
    error: str = ""
    warned: list[str] = field(default_factory=list, repr=False)

    def after(self, batches: int) -> "Record":
        """The part behind a number of batches."""
        return Record([event for event in self.events if event[0] > batches], self.weights)


@dataclass
class Runs:
    """Records of one member on one rank; ``resumed`` by the number of batches before the stop."""

    plain: Record
    ours: Record
    resumed: dict[int, Record] = field(default_factory=dict)


class Writer(DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record, self.consumed = record, lambda: 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if values := numbers(metrics):
            self.record.events.append((self.consumed(), f"logged at {step}", values))


class Watch(pl.Callback):
    """Writes down losses, learning rates and metrics."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def note(self, trainer: pl.Trainer, what: str, values: Mapping[str, Any]) -> None:
        self.record.events.append((batches_consumed(trainer), what, numbers(values)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        rates = [group["lr"] for one in trainer.optimizers for group in one.param_groups]
        loss = outputs["loss"] if isinstance(outputs, dict) and outputs else math.pi  # no loss
        values = {f"rate {number}": rate for number, rate in enumerate(rates)} | {"loss": loss}
        self.note(trainer, "batch", values)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer, "validation", trainer.callback_metrics)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer, "end", trainer.callback_metrics)


class Seeded(pl.Callback):
    """Seeds as ExactResume does, for plain Lightning."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        reseed(SEED, batches_consumed(trainer), replica(trainer)[1], "epoch")

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        reseed(SEED, batches_consumed(trainer), replica(trainer)[1], "train")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        reseed(SEED, batches_consumed(trainer), replica(trainer)[1], "validate")


class SaveAt(Checkpoint):
    """A user's own callback that saves in the middle of a window."""

    def __init__(self, folder: str) -> None:
        self.path = f"{folder}/middle.ckpt"

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if batches_consumed(trainer) == MIDDLE:
            trainer.save_checkpoint(self.path)


class KillAfterSave(pl.Callback):
    """Kills the process, without any chance to clean up."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if batches_consumed(trainer) == MIDDLE:
            os.kill(os.getpid(), signal.SIGKILL)


class SaveEnd(pl.Callback):
    """Saves the weights at the end, from all ranks that hold a part."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}/end.ckpt", weights_only=True)


def fit(
    row: Row,
    folder: str,
    strategy: Callable[[], dict[str, Any]],
    *,
    ours: bool,
    ckpt_path: str | None = None,
    extra: Sequence[pl.Callback] = (),
) -> Record:
    """Train a fresh module in ``folder``."""
    record = Record()
    writer = Writer(record)
    callbacks: list[pl.Callback] = [Seeded()] if row.draws and not ours else []
    if ours:
        callbacks += [make(folder) for make in (*OURS, *(OF_TOKENS if row.tokens else ()))]
    with quiet() as warned:
        try:
            pl.seed_everything(SEED, verbose=False)
            module = row.module()
            trainer = pl.Trainer(
                **{
                    "max_epochs": 2,
                    "accelerator": "cpu",
                    "devices": 1,
                    "logger": writer,
                    "log_every_n_steps": 1,
                    "val_check_interval": 2,
                    "num_sanity_val_steps": 0,
                    "accumulate_grad_batches": 2,
                    "gradient_clip_val": 1.0,
                    "enable_checkpointing": ours,
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                    "callbacks": [*callbacks, *extra, Watch(record), SaveEnd()],
                    "default_root_dir": folder,
                    **row.trainer,
                    **strategy(),
                }
            )
            writer.consumed = lambda: batches_consumed(trainer)
            trainer.fit(module, ckpt_path=ckpt_path)
            if type(module).predict_step is not pl.LightningModule.predict_step:
                for number, output in enumerate(trainer.predict(module, module.val_dataloader())):
                    record.events.append((10**6, f"prediction {number}", numbers(output)))
            state = read_checkpoint(f"{folder}/end.ckpt")["state_dict"]
            record.weights = {name: value.flatten().tolist() for name, value in state.items()}
        except Exception as error:
            record.error = "".join(traceback.format_exception_only(error))
        finally:
            if isinstance(trainer.strategy, ZeROInfinityStrategy):
                trainer.strategy.close()  # the next run goes on in its folder
    record.warned = [str(warning.message) for warning in warned]
    return record


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Values as numbers, without those of our callbacks; a tensor of several is several."""
    flat = {}
    for name, value in values.items():
        if name.startswith(LOGGED_BY_US):
            continue
        many = torch.as_tensor(value).flatten().tolist()
        flat |= {f"{name}[{i}]" if len(many) > 1 else name: float(x) for i, x in enumerate(many)}
    return flat


def all_runs(
    row: Row, strategy: Callable[[], dict[str, Any]], folder: Path, *, plain: bool
) -> Runs:
    """Every run of a member, one after the other, on this rank."""
    places = [str(folder / name) for name in ("plain", "ours", "resumed")]
    for place in places:
        Path(place).mkdir(exist_ok=True)
    theirs = fit(row, places[0], strategy, ours=False) if plain else Record()
    ours = fit(row, places[1], strategy, ours=True, extra=[SaveAt(places[1])])
    resumed = {}
    if not ours.error:
        ends = max(batches for batches, *_ in ours.events if batches < 10**6)
        found = [
            (consumed_in(path), str(path))
            for path in Path(places[1]).glob("*.ckpt")
            if path.stem != "end"
        ]
        found = sorted(entry for entry in found if entry[0] < ends)
        for batches, path in dict.fromkeys((found[0], found[-1])):
            resumed[batches] = fit(row, places[2], strategy, ours=True, ckpt_path=path)
            if resumed[batches].error:
                break  # ranks of a pipeline that failed have left their group: the next would wait
    return Runs(theirs, ours, resumed)


def plain_options() -> dict[str, Any]:
    """No strategy."""
    return {}


def on_rank(row: Row, strategy: str, rank: int) -> Callable[[], dict[str, Any]]:
    """The strategy of a run, anew for each."""
    settings: dict[str, Any] = {"params_buffer_count": 2, "sub_group_size": 100}
    makers: dict[str, Callable[[], Any]] = {
        "zero_infinity, 2 ranks": lambda: ZeROInfinityStrategy(overwrite=True, **settings),
        "ddp": lambda: DDPStrategy(find_unused_parameters=row.unused),
        "pipeline": lambda: PipelineStrategy("1F1B", num_microbatches=2),
    }
    if strategy == "auto":
        return plain_options
    if strategy == "zero_infinity":
        return lambda: {"strategy": ZeROInfinityStrategy(overwrite=True, **settings)}
    return lambda: {
        "strategy": makers[strategy](),
        "devices": 2,
        "plugins": [ForkedRanks(rank, 2)],
    }


@cache
def runs(row: Row, strategy: str) -> list[Runs]:
    """The runs of a member by rank; each is trained once in a session."""
    with tempfile.TemporaryDirectory() as folder:
        if strategy in ALONE:
            setting = on_rank(row, strategy, 0)
            return [all_runs(row, setting, Path(folder), plain=strategy == "auto")]

        def train(rank: int) -> Runs:
            setting = on_rank(row, strategy, rank)
            return all_runs(row, setting, Path(folder), plain=strategy == "ddp")

        return run_ranks(train, timeout_s=120)


def killed_and_resumed(row: Row, strategy: str) -> list[Record]:
    """The records, by rank, of a run that goes on where another was killed."""
    ranks = 1 if strategy in ALONE else 2
    with tempfile.TemporaryDirectory() as folder:

        def train(rank: int, **options: Any) -> Record:
            return fit(row, folder, on_rank(row, strategy, rank), ours=True, **options)

        def be_killed(rank: int) -> Record:
            return train(rank, extra=[SaveAt(folder), KillAfterSave()])

        ended = end_of_ranks(be_killed, ranks, timeout_s=120, group=ranks > 1)
        assert [end.exit_code for end in ended] == [-signal.SIGKILL] * ranks
        path = f"{folder}/middle.ckpt"
        return run_ranks(partial(train, ckpt_path=path), ranks, timeout_s=120, group=ranks > 1)


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    names = ("lightning.pytorch", "lightning.fabric")
    before = [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield warned
    for name, level in zip(names, before, strict=True):
        logging.getLogger(name).setLevel(level)
