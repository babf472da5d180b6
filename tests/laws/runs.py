"""One short training run, described by members, that writes down every loss."""

import logging
import os
import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_align.run.exact_resume import ExactResume
from lightning_align.run.position import batches_consumed
from tests.helpers.resume import SaveEveryBatch, weights_hash
from tests.laws.members import (
    DATAMODULES,
    OPTIMIZERS,
    RECORDS,
    Member,
    build,
    class_of,
    without_dropout,
)

SEED = 7


@dataclass(frozen=True)
class Run:
    """What takes part in a run of two short epochs."""

    module: Member
    data: Member
    callbacks: tuple[Member, ...] = ()
    optimizer: Member = OPTIMIZERS[0]
    strategy: Member | None = None
    devices: int = 1
    batch_size: int = 4  # of each rank
    accumulate: int = 1
    max_epochs: int = 2
    limit_batches: int | None = None
    dropout: bool = True

    @property
    def module_spec(self) -> dict[str, Any]:
        spec = with_arguments(self.module.spec, optimizer=self.optimizer.spec)
        return spec if self.dropout else without_dropout(spec)

    @property
    def data_spec(self) -> dict[str, Any]:
        return with_arguments(self.data.spec, batch_size=self.batch_size)

    def trainer_options(self, folder: Path) -> dict[str, Any]:
        return {
            "max_epochs": self.max_epochs,
            "accelerator": "cpu",
            "devices": self.devices,
            "strategy": self.strategy.spec if self.strategy else "auto",
            "accumulate_grad_batches": self.accumulate,
            "gradient_clip_val": 1.0,
            "limit_train_batches": self.limit_batches or 1.0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(
                issubclass(class_of(member.spec), Checkpoint) for member in self.callbacks
            ),
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "default_root_dir": str(folder),
        }

    def fit(
        self,
        folder: Path,
        material: Path,
        *,
        ckpt_path: str | None = None,
        extra: Sequence[pl.Callback] = (),
    ) -> "Outcome":
        """Train in ``folder``."""
        with self.trainer(folder, material, extra=extra) as (trainer, module, data):
            trainer.fit(module, data, ckpt_path=ckpt_path)
        return Outcome.read(folder)

    @contextmanager
    def trainer(
        self, folder: Path, material: Path, *, extra: Sequence[pl.Callback] = ()
    ) -> Iterator[tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule]]:
        """Everything built, and nothing trained yet."""
        with quiet():
            pl.seed_everything(SEED, verbose=False)
            folders = {"data": str(material), "run": str(folder)}
            module = build(self.module_spec, folders)
            callbacks = [build(member.spec, folders) for member in self.callbacks]
            if needs_exact_resume(self):
                callbacks.append(ExactResume())
            options = {name: build(v, folders) for name, v in self.trainer_options(folder).items()}
            callbacks += [Recorder(str(folder)), *extra]
            trainer = pl.Trainer(callbacks=callbacks, **options)
            yield trainer, module, build(self.data_spec, folders)


@dataclass(frozen=True)
class Outcome:
    """Losses of each rank by position, to the last bit, and a hash of the final weights."""

    losses: tuple[dict[int, float], ...]
    weights: str

    @staticmethod
    def read(folder: Path) -> "Outcome":
        """What a Recorder wrote; where a batch was trained twice, the later one counts."""
        losses = []
        for path in sorted(folder.glob("losses.*")):
            lines = [line.split() for line in path.read_text().splitlines()]
            losses.append({int(position): float.fromhex(loss) for position, loss in lines})
        return Outcome(tuple(losses), (folder / "weights").read_text())


class Recorder(pl.Callback):
    """Writes down what an Outcome holds."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with (self.folder / f"losses.{trainer.global_rank}").open("a") as file:
            file.write(f"{batches_consumed(trainer)} {float(outputs['loss']).hex()}\n")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        strategy = trainer.strategy
        whole = strategy.gathered() if hasattr(strategy, "gathered") else nullcontext()
        with whole:
            if trainer.is_global_zero or isinstance(strategy, ModelParallelStrategy):
                weights = weights_hash(pl_module)
            if trainer.is_global_zero:
                (self.folder / "weights").write_text(weights)


class KillAt(pl.Callback):
    """Kills all processes of the run, without any chance to clean up, before a batch."""

    def __init__(self, position: int) -> None:
        self.position = position

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batches_consumed(trainer) == self.position:
            self.kill()

    def kill(self) -> None:
        os.killpg(0, signal.SIGKILL)


def fit_and_be_killed(run: Run, folder: Path, material: Path, position: int) -> str:
    """Run in processes that are killed at ``position``; returns the last checkpoint."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # with the processes that a strategy starts
        try:
            run.fit(folder, material, extra=[SaveEveryBatch(), KillAt(position)])
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the run ended before it was to be killed"
    assert os.WTERMSIG(status) == signal.SIGKILL
    return str(folder / f"batch={position}.ckpt")


def with_arguments(spec: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    return {**spec, "init_args": {**spec.get("init_args", {}), **arguments}}


@contextmanager
def quiet() -> Iterator[None]:
    names = ("lightning.pytorch", "lightning.fabric")
    before = [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for name, level in zip(names, before, strict=True):
        logging.getLogger(name).setLevel(level)


def on_its_data(module: Member) -> Run:
    """A run of ``module`` on the first datamodule that makes its kind of batches."""
    kinds = (*DATAMODULES, RECORDS)
    return Run(module, next(data for data in kinds if data.batches == module.batches))


def refusal(*members: Member) -> str | None:
    """What must be said at ``setup`` if one of ``members`` does not work with another."""
    found = (one.refuses.get(other.name) for one in members for other in members)
    return next(filter(None, found), None)


def needs_exact_resume(run: Run) -> bool:
    """Whether ExactResume is to be named: our modules bring it themselves."""
    named = any(member.spec["class_path"].endswith("ExactResume") for member in run.callbacks)
    ours = run.module.spec["class_path"].startswith("lightning_align.")
    return not named and not ours
