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
from datetime import timedelta
from functools import partial
from typing import Any, Literal
from weakref import proxy, ref

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_align._compat import lightning_logged, lightning_resume
from lightning_align.callbacks.checkpoint_checks import (
    check_folders,
    check_kept,
    check_strategy,
    check_triggers,
    check_writing,
)
from lightning_align.callbacks.checkpoint_folder import (
    SAVES,
    CheckpointFolder,
    order_in_run,
    path_in,
)
from lightning_align.callbacks.checkpoint_monitor import check_logged, is_logged, score_of
from lightning_align.callbacks.checkpoint_names import (
    check_constants,
    check_filename,
    file_name,
    warn_of_unlogged,
)
from lightning_align.callbacks.checkpoint_standing import standing
from lightning_align.checkpointing import (
    Commit,
    committed_checkpoints,
    latest_valid_checkpoint,
)
from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.manifest import Manifest
from lightning_align.checkpointing.retention import Retention
from lightning_align.run.accumulation import is_safe_point
from lightning_align.run.exact_resume import ExactResume
from lightning_align.run.interrupt import DeferredInterrupt

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
        verbose: Whether to say of every checkpoint what it reached and where it is.
        mode: Whether the ``min`` or the ``max`` value is best.
        save_top_k: Number of best checkpoints to keep; -1 keeps all, 0 none.
        save_last: Whether the newest checkpoint is saved and kept whatever its rank.
        every_n_train_steps: Optimizer steps between checkpoints.
        train_time_interval: Time between checkpoints.
        every_n_epochs: Epochs between checkpoints; 1 if none of the three is given.
        save_on_train_epoch_end: Whether epochs are saved after their end and not after validation.
        save_on_exception: Whether to save when training is interrupted between two batches; Ctrl-C
            then waits for the end of the batch. What was saved before is written in any case. Of
            several ranks, Ctrl-C and SIGTERM on one stop and save all; other exceptions do not.
        save_weights_only: Whether to leave out all that a resume needs.
        auto_insert_metric_name: Whether names of metrics stand in the filename before their values.
        enable_version_counter: Must be True, since no file is overwritten.
        backpressure: If the earlier save is still being written: ``wait`` for it, ``skip`` this
            one, or keep only the ``latest`` of those that wait.
        flush_timeout_s: Seconds that writing may take after an exception, SIGTERM or Ctrl-C.
        storage_options: Passed to the filesystem of a URL.

    Raises:
        ValueError: If an argument is out of range, the strategy shards its state, another
            CheckpointIO is in use, a validation has run without logging ``monitor``, ``dirpath``
            holds checkpoints of another run, or another callback of the Trainer writes there.
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
        verbose: bool = False,
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
        enable_version_counter: bool = True,
        backpressure: Literal["wait", "skip", "latest"] = "wait",
        flush_timeout_s: float = 60.0,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        check_triggers(every_n_train_steps, train_time_interval, every_n_epochs)
        check_kept(monitor, mode, save_top_k, save_last, enable_version_counter)
        check_writing(backpressure, flush_timeout_s)
        super().__init__(
            os.fspath(dirpath) if dirpath is not None else None,
            filename,
            monitor,
            verbose=verbose,
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
        self._untold_fields = self._check_names()
        self.run_id = uuid.uuid4().hex
        self._trainer: ref[pl.Trainer] | None = None  # whose run it is
        self._saves = 0  # of the run, with those of other callbacks, up to the last of this one
        self._folder: CheckpointFolder | None = None  # on rank zero while fitting
        self._retention = self._new_retention()
        self._due: dict[str, Tensor] | None = None  # the metrics when a save became due
        self._interrupt = DeferredInterrupt()
        self._stopping_together = False

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to this process: its run, folder and signals."""
        here = {"_trainer": None, "_folder": None, "_interrupt": DeferredInterrupt()}
        return {**vars(self), **here}

    def _check_names(self) -> set[str]:
        """Metrics in the filename, of which nobody was told that they are not logged."""
        check_constants(self)
        return set() if self.filename is None else check_filename(self.filename, self._formatted)

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
        dirpath = lightning_resume.resolve_checkpoint_dir(self, trainer)
        self.dirpath = trainer.strategy.broadcast(dirpath)
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        check_strategy(trainer.strategy)
        self._untold_fields = self._check_names()  # all of it may have been set since
        if not any(isinstance(callback, ExactResume) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            exact_resume = ExactResume()
            trainer.callbacks = [exact_resume, *trainer.callbacks]  # type: ignore[attr-defined]
            exact_resume.setup(trainer, pl_module, stage)
        self._due, self._defer_save_until_validation = None, False
        self._join_run(trainer)
        self._on_rank_zero(trainer, partial(self._open, trainer))

    def _join_run(self, trainer: pl.Trainer) -> None:
        """One id for all callbacks of a Trainer. Another one is another run, until it resumes."""
        if self._trainer is None or self._trainer() is not trainer:
            self._trainer, self.run_id = ref(trainer), uuid.uuid4().hex
            self._retention = self._new_retention()
            self._publish()
        self.run_id = self._of_one_run(trainer)[0].run_id  # the first is set up before the others

    def _of_one_run(self, trainer: pl.Trainer) -> "list[AsyncCheckpoint]":
        ours = [each for each in trainer.checkpoint_callbacks if isinstance(each, AsyncCheckpoint)]
        return ours or [self]

    def _open(self, trainer: pl.Trainer) -> None:
        assert self.dirpath is not None
        check_folders(self, trainer)
        self._close(self.flush_timeout_s)
        surplus: list[str] = []
        if self._retention.newest:  # of an earlier fit of this Trainer
            found = committed_checkpoints(self.dirpath, self.storage_options)
            names = {manifest.name for manifest in found}
            surplus = self._retention.load_state_dict(self._retention.state_dict(), names)
        self._folder = CheckpointFolder(
            str(self.dirpath),
            self._retention,
            backpressure=self.backpressure,
            storage_options=self.storage_options,
            on_change=self._publish,
        )
        self._folder.delete(surplus)
        self._saves = self._folder.saves_of_run

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
        if self._folder is not None:
            self._folder.refuse_other_runs(self.run_id)

    # When.

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._stopping_together = False
        if self.save_on_exception:
            self._interrupt.install()
        if trainer.world_size > 1:
            self._interrupt.watch_sigterm(trainer)

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
        self._stop_if_interrupted(trainer)

    def _stop_if_interrupted(self, trainer: pl.Trainer, *, defer: bool = True) -> None:
        if trainer.world_size > 1:
            self._stopping_together = self._interrupt.share(trainer)
        self._interrupt.release(defer=defer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_if_interrupted(trainer, defer=False)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self._defer_save_until_validation:
            self._mark_due(trainer)
        if not self._should_save_on_train_epoch_end(trainer):
            self._mark_due_by_epoch(trainer)
        self._save_if_due(trainer)
        self._stop_if_interrupted(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hear(trainer)
        if self._defer_save_until_validation:
            self._mark_due(trainer)
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
        of_the_step = lightning_logged.logged_in_training(trainer, self._due)
        metrics = {**self._monitor_candidates(trainer), **of_the_step}
        self._due, self._defer_save_until_validation = None, False
        if self.monitor is None or is_logged(trainer, self.monitor, metrics):
            self._save(trainer, metrics, self._score(metrics))
            return
        # A step's save waits for the validation that logs the value; an epoch's comes again anyway.
        self._defer_save_until_validation = self._every_n_epochs == 0
        if not trainer.training or _epoch_is_closed(trainer):
            check_logged(trainer, self.monitor, metrics)

    # What.

    def _score(self, metrics: dict[str, Tensor]) -> float:
        if self.monitor is None:
            return float(metrics["step"])
        return score_of(metrics, self.monitor, self.mode)

    def _save(
        self,
        trainer: pl.Trainer,
        metrics: dict[str, Tensor],
        score: float | None,
        *,
        keep: bool = False,
    ) -> None:
        """Save what is among the best, the newest if that is wanted, and what is to be kept."""
        ranked = trainer.is_global_zero and score is not None and self._retention.admits(score)
        wanted = ranked or (trainer.is_global_zero and (keep or bool(self.save_last)))
        if not trainer.strategy.reduce_boolean_decision(wanted, all=False):
            self._tell_of_what_was_not_saved(trainer, score)
            return
        start = time.perf_counter()
        name = ""
        if self._folder is not None:
            self._folder.make_room()
            name = self._folder.free_name(
                partial(self._formatted, dict(metrics)), self.STARTING_VERSION
            )
            if keep and not ranked:
                self._retention.protect(name)
            self._retention.begin(name, score if ranked else None)
        checkpoint = lightning_resume.dump_checkpoint(trainer, self.save_weights_only)  # collective
        self._last_global_step_saved = trainer.global_step
        if self._folder is None:
            return
        self._untold_fields -= warn_of_unlogged(str(self.filename), self._untold_fields, metrics)
        metadata = self._metadata(trainer, score)
        result = self._folder.save(checkpoint, name, trainer.global_step, metadata)
        self._log(
            trainer,
            {
                "checkpoint/stall_s": time.perf_counter() - start,
                "checkpoint/bytes": float(result.copied_bytes),
                "checkpoint/skipped": float(result.skipped),
            },
        )

    def _metadata(self, trainer: pl.Trainer, score: float | None) -> dict[str, Any]:
        self._saves = 1 + max(each._saves for each in self._of_one_run(trainer))
        return {
            "run": self.run_id,
            SAVES: self._saves,
            "monitor": self.monitor,
            "score": score if self.monitor and score is not None and math.isfinite(score) else None,
            "epoch": trainer.current_epoch,
            "world_size": trainer.world_size,
            "wandb_run_id": lightning_resume.wandb_run_id(trainer),
        }

    def _formatted(self, metrics: dict[str, Tensor], version: int | None = None) -> str:
        path = self.format_checkpoint_name(metrics, ver=version)
        return file_name(path[len(os.path.join(str(self.dirpath), "")) :] if self.dirpath else path)

    def _tell_of_what_was_not_saved(self, trainer: pl.Trainer, score: float | None) -> None:
        if self.verbose:
            rank_zero_info(
                f"Epoch {trainer.current_epoch}, global step {trainer.global_step}:"
                f" {self.monitor!r} was {score}, not in top {self.save_top_k}"
            )

    def _log(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    # What the writing thread tells.

    def _publish(self) -> None:
        """Name what is committed, and nothing else; on the writing thread, too."""
        self.__dict__.update(self._standing(self._retention))

    def _standing(self, retention: Retention) -> dict[str, Any]:
        return standing(retention, self._path, monitored=self.monitor is not None)

    def _path(self, name: str) -> str:
        return path_in(str(self.dirpath), name, self.storage_options)

    def _hear(self, trainer: pl.Trainer) -> None:
        """Take note of what the writing thread did since, on the training thread."""
        if self._folder is None:
            return
        for commit in self._folder.new_commits():
            self._log(trainer, {"checkpoint/persist_s": commit.persist_s})
            if self.verbose:
                self._tell_of(commit)
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        for error in self._folder.new_errors():
            rank_zero_warn(f"AsyncCheckpoint: {error.message} Training goes on.")

    def _tell_of(self, commit: Commit) -> None:
        epoch, score = commit.manifest.metadata["epoch"], commit.manifest.metadata["score"]
        reached = ""
        if score is not None and self.best_model_score is not None:
            best = float(self.best_model_score)
            reached = f" {self.monitor!r} reached {score:.5f} (best {best:.5f}),"
        where = f"Epoch {epoch}, global step {commit.manifest.step}"
        rank_zero_info(f"{where}:{reached} saved {commit.path!r}")

    # The end of a run.

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1:
            self._interrupt.release()
        self._interrupt.uninstall()
        if self.save_last and not self._last_global_step_saved and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer, self._monitor_candidates(trainer), None)
        self._flush(trainer, None)
        standing = trainer.strategy.broadcast(self._standing(self._retention))
        self.__dict__.update(standing)  # fit(ckpt_path="best") asks on every rank

    def _flush(self, trainer: pl.Trainer, timeout_s: float | None) -> None:
        if self._folder is None:
            return
        self._folder.wait(timeout_s)
        self._hear(trainer)
        if self._folder.num_failed:
            complete = self.last_model_path or "none"
            rank_zero_warn(
                f"AsyncCheckpoint: {self._folder.num_failed} of {self._folder.num_saved}"
                f" checkpoints of this run were not written. Last complete checkpoint: {complete}."
            )

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._interrupt.uninstall()
        if self._folder is None and trainer.world_size == 1:
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
        elif trainer.world_size == 1 or self._stopping_together:
            # Saving is collective: of several ranks all must have stopped at the same batch.
            score = float(trainer.global_step) if self.monitor is None else None
            self._save(trainer, self._monitor_candidates(trainer), score, keep=True)
            rank_zero_info(f"AsyncCheckpoint: saved step {trainer.global_step} before stopping.")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._interrupt.uninstall()
        self._close(None)

    def _close(self, timeout_s: float | None) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.close(timeout_s)

    # Resuming.

    @override
    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        """What ``ckpt_path="last"`` may choose from; Lightning asks before loggers start a run.

        The first callback answers for all, since Lightning would go by the time of the files, which
        a copy of them changes.
        """
        ours = self._of_one_run(trainer)
        if ours[0] is not self:
            return set()
        found = [found for each in ours if (found := each._newest(trainer)) is not None]
        if not found:
            return set()
        newest, path = max(found, key=lambda each: order_in_run(each[0]))
        if newest.metadata.get("wandb_run_id"):
            lightning_resume.continue_wandb_run(trainer, newest.metadata["wandb_run_id"])
        return {path}

    def _newest(self, trainer: pl.Trainer) -> tuple[Manifest, str] | None:
        dirpath = str(lightning_resume.resolve_checkpoint_dir(self, trainer))
        path = self.latest(dirpath, self.storage_options)
        committed = committed_checkpoints(dirpath, self.storage_options) if path else []
        name = str(path).rsplit("/", 1)[-1].removesuffix(self.FILE_EXTENSION)
        return next(((found, str(path)) for found in committed if found.name == name), None)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_RUN_KEY] = {
            "id": self.run_id,
            "wandb_run_id": lightning_resume.wandb_run_id(trainer),
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
        name = None
        if self.dirpath is not None and Folder(directory or ".").key == Folder(self.dirpath).key:
            name = file.removesuffix(self.FILE_EXTENSION)
            self._retention.protect(name)
        if self._folder is not None:
            self._folder.continue_from(name, checkpoint["global_step"])
        before, now = run["wandb_run_id"], lightning_resume.wandb_run_id(trainer)
        if before and now and before != now:
            rank_zero_warn(
                f"The checkpoint is of the W&B run {before}, and this run logs to {now}. To"
                " continue that one use fit(ckpt_path='last'), or"
                f" WandbLogger(id={before!r}, resume='must')."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        """As it will be where this can be read: once what is being written now is committed."""
        expected = self._standing(self._retention.expected())
        return {**super().state_dict(), **expected, "retention": self._retention.state_dict()}

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
        surplus = self._retention.load_state_dict(state_dict["retention"], names)
        self._publish()
        if self._folder is not None:
            self._folder.delete(surplus)

    def _new_retention(self) -> Retention:
        mode = self.mode if self.monitor is not None else "max"
        return Retention(self.save_top_k, mode, bool(self.save_last))


def _epoch_is_closed(trainer: pl.Trainer) -> bool:
    progress: Any = trainer.fit_loop.epoch_progress.current
    return bool(progress.processed == progress.started)
