"""AsyncCheckpoint: Lightning's ModelCheckpoint, saved by a memory copy and written behind the run.

ModelCheckpoint decides when to save, under which name, and what is worth keeping; its words and
its ``ckpt_path="best"`` and ``"last"`` stay. What changes is how: the state is copied where the run
may be interrupted without losing a validation or the end of an epoch, a thread writes the copy, and
everything that names a checkpoint (``best_model_path``, loggers, retention) hears of it only after
its commit.
"""

import math
import os
import time
import uuid
import warnings
from collections import deque
from datetime import timedelta
from typing import Any, Literal
from weakref import proxy

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from typing_extensions import override

from lightning_align import _compat_resume
from lightning_align._errors import argument_error
from lightning_align.checkpointing import (
    Commit,
    SnapshotEngine,
    committed_checkpoints,
    latest_valid_checkpoint,
)
from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.retention import Retention
from lightning_align.run.exact_resume import ExactResume
from lightning_align.run.interrupt import DeferredInterrupt
from lightning_align.run.state import is_safe_point

_RUN_KEY = "lightning_align.run"


class AsyncCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that costs a memory copy, and checkpoints that a run resumes from exactly.

    A background thread writes the copy to a local folder or any fsspec URL, with checksums; a
    checkpoint counts once its manifest, written last, is there. Brings ``ExactResume`` if the
    Trainer has none. ``fit(ckpt_path="last")`` goes on from the newest checkpoint that is whole,
    and continues its W&B run.

    Args:
        dirpath: Folder or URL of the checkpoints; by default as ModelCheckpoint chooses it. One run
            writes a folder.
        filename: Name with metrics in braces, such as ``"{epoch}-{val_loss:.2f}"``; by default
            ``"{epoch}-{step}"``. A name that is taken gets ``-v1``, ``-v2``, ...
        monitor: Logged value that ranks the checkpoints; by default the newest is best.
        mode: Whether the ``min`` or the ``max`` value is best.
        save_top_k: Number of best checkpoints to keep; -1 keeps all, 0 none.
        save_last: Whether the newest checkpoint is saved and kept whatever its rank.
        every_n_train_steps: Optimizer steps between checkpoints.
        train_time_interval: Time between checkpoints.
        every_n_epochs: Epochs between checkpoints; 1 if none of the three is given.
        save_on_train_epoch_end: Whether epochs are saved after their end and not after validation.
        save_on_exception: Whether to save when training is interrupted between two batches; Ctrl-C
            then waits for the end of the batch. What was saved before is written in any case.
        save_weights_only: Whether to leave out all that a resume needs.
        auto_insert_metric_name: Whether names of metrics stand in the filename before their values.
        backpressure: If the earlier save is still being written: ``wait`` for it, ``skip`` this
            one, or keep only the ``latest`` of those that wait.
        flush_timeout_s: Seconds that writing may take after an exception, SIGTERM or Ctrl-C.
        storage_options: Passed to the filesystem of a URL.

    Raises:
        ValueError: If an argument is out of range, the strategy shards its state, another
            CheckpointIO is in use, ``monitor`` is never logged, or ``dirpath`` holds checkpoints of
            another run.
        RuntimeError: If another run is writing to ``dirpath``.

    Example:
        >>> callback = AsyncCheckpoint("checkpoints", every_n_train_steps=100, save_top_k=3,
        ...                            monitor="val_loss")

    Note: with optimizer state of the size of the model twice over, the copy takes host memory of
    three times the model.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        *,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_last: bool = False,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        auto_insert_metric_name: bool = True,
        backpressure: Literal["wait", "skip", "latest"] = "wait",
        flush_timeout_s: float = 60.0,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        _check_triggers(every_n_train_steps, train_time_interval, every_n_epochs)
        _check("mode", mode, mode in ("min", "max"), "must be 'min' or 'max'")
        _check("save_top_k", save_top_k, save_top_k >= -1, "must be at least -1")
        _check(
            "save_top_k",
            save_top_k,
            monitor is not None or save_top_k in (-1, 0, 1),
            "without monitor there is no best to keep more than one of",
            "Set monitor, or save_top_k to -1, 0 or 1",
        )
        _check(
            "backpressure",
            backpressure,
            backpressure in ("wait", "skip", "latest"),
            "must be 'wait', 'skip' or 'latest'",
        )
        _check("flush_timeout_s", flush_timeout_s, flush_timeout_s > 0, "must be above 0")
        _check("save_last", save_last, isinstance(save_last, bool), "must be True or False")
        super().__init__(
            os.fspath(dirpath) if dirpath is not None else None,
            filename,
            monitor,
            save_last=save_last,
            save_top_k=save_top_k,
            save_on_exception=save_on_exception,
            save_weights_only=save_weights_only,
            mode=mode,
            auto_insert_metric_name=auto_insert_metric_name,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end,
        )
        self.backpressure = backpressure
        self.flush_timeout_s = flush_timeout_s
        self.storage_options = storage_options
        self.run_id = uuid.uuid4().hex
        self._engine: SnapshotEngine | None = None  # on rank zero while fitting
        self._retention = self._new_retention()
        self._due: dict[str, Tensor] | None = None  # the metrics when a save became due
        self._names: set[str] = set()  # taken in the folder
        self._commits: deque[Commit] = deque()  # that the training thread has not heard of
        self._num_saved = self._num_failed = 0
        self._interrupt = DeferredInterrupt()

    # Where and whether.

    @staticmethod
    def latest(
        dirpath: str | os.PathLike[str], storage_options: dict[str, Any] | None = None
    ) -> str | None:
        """Path of the newest checkpoint that is whole, or None; damaged ones are warned of.

        Args:
            dirpath: Folder or URL of the checkpoints.
            storage_options: Passed to the filesystem of a URL.
        """
        return latest_valid_checkpoint(dirpath, storage_options)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        dirpath = _compat_resume.resolve_checkpoint_dir(self, trainer)
        self.dirpath = trainer.strategy.broadcast(dirpath)
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        _check_strategy(trainer.strategy)
        if not any(isinstance(callback, ExactResume) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            exact_resume = ExactResume()
            trainer.callbacks = [exact_resume, *trainer.callbacks]  # type: ignore[attr-defined]
            exact_resume.setup(trainer, pl_module, stage)
        self._retention = self._new_retention()
        self._due = None
        self._num_saved = self._num_failed = 0
        self._on_rank_zero(trainer, self._open)

    def _open(self) -> None:
        assert self.dirpath is not None
        self._close(self.flush_timeout_s)
        self._engine = SnapshotEngine(
            self.dirpath,
            backpressure=self.backpressure,
            storage_options=self.storage_options,
            on_commit=self._on_commit,
        )
        self._names = {name.split(".ckpt")[0] for name in self._engine.folder.names()}

    def _on_rank_zero(self, trainer: pl.Trainer, action: Any) -> None:
        """Run ``action`` where the files are; what it raises is raised on every rank."""
        error: BaseException | None = None
        if trainer.is_global_zero:
            try:
                action()
            except Exception as raised:
                error = raised
        message = trainer.strategy.broadcast(str(error) if error is not None else "")
        if error is not None:
            raise error
        if message:
            raise RuntimeError(f"On rank 0: {message}")

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._on_rank_zero(trainer, self._refuse_other_runs)

    def _refuse_other_runs(self) -> None:
        if self._engine is None:
            return
        for found in self._engine.committed:
            if found.metadata.get("run") != self.run_id:
                raise argument_error(
                    "AsyncCheckpoint",
                    "dirpath",
                    self.dirpath,
                    f"holds checkpoints of another run, such as {found.name!r} (step {found.step}),"
                    " and a resume could not tell them apart",
                    "Resume that run with fit(ckpt_path='last'), or choose another dirpath",
                )

    # When.

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.save_on_exception and trainer.world_size == 1:
            self._interrupt.install()

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._hear(trainer)
        every_n = self._every_n_train_steps
        if every_n > 0 and trainer.global_step % every_n == 0:
            self._mark_due(trainer)
        if self._train_time_interval is not None and self._time_is_up(trainer):
            self._mark_due(trainer)
        self._save_if_due(trainer)
        self._interrupt.release()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._interrupt.release(defer=False)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if not self._should_save_on_train_epoch_end(trainer):
            self._mark_due_by_epoch(trainer)
        self._save_if_due(trainer)
        self._interrupt.release()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hear(trainer)
        if self._should_save_on_train_epoch_end(trainer):
            self._mark_due_by_epoch(trainer)
        self._save_if_due(trainer)

    def _mark_due(self, trainer: pl.Trainer) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self._due = self._monitor_candidates(trainer)

    def _mark_due_by_epoch(self, trainer: pl.Trainer) -> None:
        if self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            self._mark_due(trainer)

    def _time_is_up(self, trainer: pl.Trainer) -> bool:
        assert self._train_time_interval is not None
        now, before = time.monotonic(), self._last_time_checked
        up = before is not None and now - before >= self._train_time_interval.total_seconds()
        if trainer.world_size > 1:
            up = trainer.strategy.broadcast(up)  # clocks differ, and saving is collective
        if up:
            self._last_time_checked = now
        return up

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        if self._due is None or trainer.fast_dev_run or not is_safe_point(trainer):  # type: ignore[attr-defined]
            return
        # Where the save had to wait, what a training step logged is of that step; the validation
        # that came since is of the same weights.
        of_the_step = _compat_resume.logged_in_training(trainer, self._due)
        metrics = {**self._monitor_candidates(trainer), **of_the_step}
        if self.monitor is not None and self.monitor not in metrics:
            if trainer.training and not _epoch_is_closed(trainer):
                return  # validation may log it
            raise argument_error(
                "AsyncCheckpoint",
                "monitor",
                self.monitor,
                f"was not logged; these values were: {sorted(metrics)}",
                f"Log it with self.log({self.monitor!r}, ...)",
            )
        self._due = None
        self._save(trainer, metrics)

    # What.

    def _save(self, trainer: pl.Trainer, metrics: dict[str, Tensor]) -> None:
        score = float(metrics[self.monitor]) if self.monitor else float(trainer.global_step)
        ranked = trainer.is_global_zero and self._retention.admits(score)
        wanted = ranked or (trainer.is_global_zero and bool(self.save_last))
        if not trainer.strategy.reduce_boolean_decision(wanted, all=False):
            return
        start = time.perf_counter()
        name = self._free_name(metrics)
        if self._engine is not None:
            self._retention.begin(name, score if ranked else None)
        checkpoint = _compat_resume.dump_checkpoint(trainer, self.save_weights_only)  # collective
        self._last_global_step_saved = trainer.global_step
        if self._engine is None:
            return
        metadata = {
            "run": self.run_id,
            "monitor": self.monitor,
            "score": score if self.monitor and math.isfinite(score) else None,
            "epoch": trainer.current_epoch,
            "world_size": trainer.world_size,
            "wandb_run_id": _compat_resume.wandb_run_id(trainer),
        }
        result = self._engine.save(checkpoint, name, trainer.global_step, metadata)
        self._num_saved += 1
        for lost in (*result.replaced, *([name] if result.skipped else [])):
            self._retention.drop(lost)
        self._log(
            trainer,
            {
                "checkpoint/stall_s": time.perf_counter() - start,
                "checkpoint/bytes": float(result.copied_bytes),
                "checkpoint/skipped": float(result.skipped),
            },
        )

    def _free_name(self, metrics: dict[str, Tensor]) -> str:
        def formatted(version: int | None) -> str:
            path = self.format_checkpoint_name(dict(metrics), ver=version)
            inner = path[len(os.path.join(str(self.dirpath), "")) :]
            return inner.removesuffix(self.FILE_EXTENSION).replace("/", "_")

        name, version = formatted(None), self.STARTING_VERSION
        while name in self._names:
            name, version = formatted(version), version + 1
        self._names.add(name)
        return name

    def _log(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    # What the writing thread tells.

    def _on_commit(self, commit: Commit) -> None:
        """On the writing thread, before anything is deleted for this commit."""
        surplus = self._retention.commit(commit.manifest.name)
        self._publish()
        self._commits.append(commit)
        for name in surplus:
            if self._engine is not None:
                self._engine.delete(name)

    def _publish(self) -> None:
        """Name what is committed, and nothing else."""
        ranked = self._retention.ranked
        scores = {self._path(name): torch.tensor(score) for name, score in ranked.items()}
        newest = self._retention.newest
        self.last_model_path = self._path(newest) if newest else ""
        self.best_model_path = next(iter(scores), self.last_model_path)
        if self.monitor is None:
            return
        self.best_model_score = scores.get(self.best_model_path)
        self.current_score = scores.get(self.last_model_path, self.current_score)
        if self.save_top_k > 0 and len(scores) == self.save_top_k:
            self.kth_best_model_path = next(reversed(scores))
            self.kth_value = scores[self.kth_best_model_path]
        self.best_k_models = scores

    def _path(self, name: str) -> str:
        assert self.dirpath is not None
        return Folder(self.dirpath, self.storage_options).path(name + self.FILE_EXTENSION)

    def _hear(self, trainer: pl.Trainer) -> None:
        """Take note of what the writing thread did since, on the training thread."""
        if self._engine is None:
            return
        while self._commits:
            commit = self._commits.popleft()
            self._log(trainer, {"checkpoint/persist_s": commit.persist_s})
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        for error in self._engine.pop_errors():
            self._num_failed += bool(error.name)
            self._retention.drop(error.name)
            rank_zero_warn(f"AsyncCheckpoint: {error.message} Training goes on.")

    # The end of a run.

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._interrupt.release()
        self._interrupt.uninstall()
        self._flush(trainer, None)
        names = ("best_model_path", "best_model_score", "last_model_path", "best_k_models")
        published = trainer.strategy.broadcast({name: getattr(self, name) for name in names})
        for name, value in published.items():  # fit(ckpt_path="best") asks on every rank
            setattr(self, name, value)

    def _flush(self, trainer: pl.Trainer, timeout_s: float | None) -> None:
        if self._engine is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # _hear tells of the same errors
            self._engine.wait(timeout_s)
        self._hear(trainer)
        if self._num_failed:
            complete = self.last_model_path or "none"
            rank_zero_warn(
                f"AsyncCheckpoint: {self._num_failed} of {self._num_saved} checkpoints of this run"
                f" were not written. Last complete checkpoint: {complete}."
            )

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._interrupt.uninstall()
        if self._engine is None and trainer.world_size == 1:
            return
        try:
            if self._should_save_on_exception(trainer):
                self._save_interrupted(trainer, exception)
            self._flush(trainer, self.flush_timeout_s)
        except Exception as error:  # never in place of what training raised
            rank_zero_warn(f"AsyncCheckpoint: nothing was saved after {exception!r}: {error!r}.")
        finally:
            self._close(self.flush_timeout_s)

    def _save_interrupted(self, trainer: pl.Trainer, exception: BaseException) -> None:
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if batches.ready != batches.processed:
            rank_zero_warn(
                f"AsyncCheckpoint: {type(exception).__name__} came in the middle of a batch, whose"
                " update may be half done; only what was saved before is kept."
            )
        elif trainer.world_size == 1 or isinstance(exception, SIGTERMException):
            # Of several ranks only a SIGTERM stops all at the same batch, and saving is collective.
            self._save(trainer, self._monitor_candidates(trainer))
            rank_zero_info(f"AsyncCheckpoint: saved step {trainer.global_step} before stopping.")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._interrupt.uninstall()
        self._close(None)

    def _close(self, timeout_s: float | None) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close(timeout_s)

    # Resuming.

    @override
    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        """What ``ckpt_path="last"`` may choose from; Lightning asks before loggers start a run."""
        dirpath = str(_compat_resume.resolve_checkpoint_dir(self, trainer))
        path = self.latest(dirpath, self.storage_options)
        if path is None:
            return set()
        name = path.rsplit("/", 1)[-1].removesuffix(self.FILE_EXTENSION)
        for found in committed_checkpoints(dirpath, self.storage_options):
            if found.name == name and found.metadata.get("wandb_run_id"):
                _compat_resume.continue_wandb_run(trainer, found.metadata["wandb_run_id"])
        return {path}

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_RUN_KEY] = {
            "id": self.run_id,
            "wandb_run_id": _compat_resume.wandb_run_id(trainer),
        }

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        run = checkpoint.get(_RUN_KEY)
        if run is None or trainer.state.fn != "fit":
            return
        self.run_id = run["id"]
        directory, _, file = str(trainer.ckpt_path).rpartition("/")
        if self.dirpath is not None and directory == str(Folder(self.dirpath)):
            self._retention.protect(file.removesuffix(self.FILE_EXTENSION))
        before, now = run["wandb_run_id"], _compat_resume.wandb_run_id(trainer)
        if before and now and before != now:
            rank_zero_warn(
                f"The checkpoint is of the W&B run {before}, and this run logs to {now}. To"
                " continue that one use fit(ckpt_path='last'), or"
                f" WandbLogger(id={before!r}, resume='must')."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "retention": self._retention.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.dirpath != state_dict["dirpath"]:
            rank_zero_warn(
                f"AsyncCheckpoint: dirpath was {state_dict['dirpath']!r} and is {self.dirpath!r}:"
                " what is best and what is kept start anew."
            )
            return
        assert self.dirpath is not None
        found = committed_checkpoints(self.dirpath, self.storage_options)
        names = {manifest.name for manifest in found}
        self.current_score = state_dict["current_score"]
        self.kth_value = state_dict["kth_value"]
        self.kth_best_model_path = state_dict["kth_best_model_path"]
        surplus = self._retention.load_state_dict(state_dict["retention"], names)
        self._publish()
        for name in surplus:
            if self._engine is not None:
                self._engine.delete(name)

    def _new_retention(self) -> Retention:
        mode = self.mode if self.monitor is not None else "max"
        return Retention(self.save_top_k, mode, bool(self.save_last))


def _check(argument: str, value: object, holds: bool, rule: str, way_out: str = "") -> None:
    if not holds:
        raise argument_error("AsyncCheckpoint", argument, value, rule, way_out)


def _check_triggers(
    every_n_train_steps: int | None,
    train_time_interval: timedelta | None,
    every_n_epochs: int | None,
) -> None:
    given = {
        "every_n_train_steps": every_n_train_steps,
        "train_time_interval": train_time_interval,
        "every_n_epochs": every_n_epochs,
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        least = timedelta(0) if isinstance(value, timedelta) else 0
        _check(name, value, value >= least, "must not be negative")  # type: ignore[operator]
    asked = [name for name, value in given.items() if value != 0]
    if len(asked) > 1:
        raise argument_error(
            "AsyncCheckpoint",
            asked[0],
            given[asked[0]],
            f"cannot be combined with {asked[1]}",
            "Add a second AsyncCheckpoint with a dirpath of its own",
        )


def _check_strategy(strategy: Strategy) -> None:
    name = type(strategy).__name__
    if type(strategy).save_checkpoint is not Strategy.save_checkpoint:
        raise argument_error(
            "AsyncCheckpoint",
            "strategy",
            name,
            "its ranks save parts of the state themselves, and only a whole one on rank 0 can be"
            " copied here",
            "Use Lightning's ModelCheckpoint with this strategy, or AsyncCheckpoint with ddp",
        )
    if type(strategy.checkpoint_io) is not TorchCheckpointIO:
        raise argument_error(
            "AsyncCheckpoint",
            "plugins",
            type(strategy.checkpoint_io).__name__,
            "would be passed over: AsyncCheckpoint writes its files itself",
            "Take it out of plugins, or use Lightning's ModelCheckpoint",
        )


def _epoch_is_closed(trainer: pl.Trainer) -> bool:
    progress: Any = trainer.fit_loop.epoch_progress.current
    return bool(progress.processed == progress.started)
