"""AsyncCheckpoint: Lightning's ModelCheckpoint, saved by a memory copy and written behind the run.

ModelCheckpoint decides when to save, under which name, and what is worth keeping; its words and
its ``ckpt_path="best"`` and ``"last"`` stay. What changes is how: the state is copied where the run
may be interrupted without losing a validation or the end of an epoch, a thread writes the copy, and
everything that names a checkpoint (``best_model_path``, loggers, retention) hears of it only after
its commit.
"""

import os
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_align._compat import lightning_resume
from lightning_align._declared import declared
from lightning_align.callbacks import checkpoint_checks as checks
from lightning_align.callbacks import checkpoint_news as news
from lightning_align.callbacks.checkpoint_folder import CheckpointFolder, path_in
from lightning_align.callbacks.checkpoint_monitor import score_of
from lightning_align.callbacks.checkpoint_names import check_names, formatted_name, warn_of_unlogged
from lightning_align.callbacks.checkpoint_place import BestOfEarlier, place_of
from lightning_align.callbacks.checkpoint_run import RUN_KEY, CheckpointRun, continue_newest, run_of
from lightning_align.callbacks.checkpoint_standing import standing
from lightning_align.callbacks.checkpoint_triggers import SaveTriggers, may_save_after
from lightning_align.checkpointing import committed_checkpoints, latest_valid_checkpoint
from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.retention import Retention
from lightning_align.run.callbacks import bring
from lightning_align.run.exact_resume import ExactResume
from lightning_align.run.interrupt import DeferredInterrupt
from lightning_align.run.position import batches_consumed


@declared
class AsyncCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that costs a memory copy, and checkpoints that a run resumes from exactly.

    A background thread writes the copy to a local folder or any fsspec URL, with checksums; a
    checkpoint counts once its manifest, written last, is there. Brings ``ExactResume`` if the
    Trainer has none. ``fit(ckpt_path="last")`` goes on from the newest checkpoint that is whole,
    and continues its W&B run.

    Args:
        dirpath: Folder or URL of the checkpoints; by default as ModelCheckpoint chooses it. A new
            run whose ``dirpath`` holds another one saves in ``version_1`` there, and so on.
        filename: Name with metrics in braces, such as ``"{epoch}-{val_loss:.2f}"``; by default
            ``"{epoch}-{step}"``. A name that is taken gets ``-v1``, ``-v2``, ...
        monitor: Logged value that ranks the checkpoints; by default the newest is best.
        verbose: Whether to say of every checkpoint what it reached and where it is.
        mode: Whether the ``min`` or the ``max`` value is best.
        save_top_k: Number of best checkpoints to keep; -1 keeps all, 0 none.
        save_last: Whether the newest checkpoint is saved and kept whatever its rank; ``last.ckpt``
            in a local folder is a link to it. ``"link"`` means the same.
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
        overwrite: Whether a new run saves in ``dirpath`` itself, and deletes the checkpoints of
            another run there behind its first commit.
        backpressure: If the earlier save is still being written: ``wait`` for it, ``skip`` this
            one, or keep only the ``latest`` of those that wait.
        flush_timeout_s: Seconds that writing may take after an exception, SIGTERM or Ctrl-C.
        storage_options: Passed to the filesystem of a URL.

    Raises:
        ValueError: If an argument is out of range, the strategy shards its state, another
            CheckpointIO is in use, a validation has run without logging ``monitor``, or another
            callback of the Trainer writes to ``dirpath``.
        RuntimeError: If another run is writing to ``dirpath``.

    Example:
        >>> callback = AsyncCheckpoint("checkpoints", every_n_train_steps=100, save_top_k=3,
        ...                            monitor="val_loss")

    Note: with optimizer state of the size of the model twice over, the copy takes host memory of
    three times the model. Under ``ZeROInfinityStrategy`` what is on disk takes no memory.
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
        save_last: bool | Literal["link"] = False,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        auto_insert_metric_name: bool = True,
        enable_version_counter: bool = True,
        overwrite: bool = False,
        backpressure: Literal["wait", "skip", "latest"] = "wait",
        flush_timeout_s: float = 60.0,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        checks.check_triggers(every_n_train_steps, train_time_interval, every_n_epochs)
        checks.check_kept(monitor, mode, save_top_k, save_last, enable_version_counter)
        checks.check_writing(backpressure, flush_timeout_s)
        checks.tell_where_no_link_is(save_last, dirpath)
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
        self.overwrite = overwrite
        self.backpressure = backpressure
        self.flush_timeout_s = flush_timeout_s
        self.storage_options = storage_options
        self._untold_fields = check_names(self)  # of which nobody was told that they are not logged
        self._triggers = SaveTriggers(
            self._every_n_train_steps, self._train_time_interval, self._every_n_epochs
        )
        self._folder: CheckpointFolder | None = None  # on rank zero while fitting
        self._interrupt = DeferredInterrupt()
        self._saves_now = False  # whether all that was saved has been withdrawn
        self._placed = ("", "")  # the folder that was given, and the one that a fit writes
        self._best_of_earlier = BestOfEarlier()
        self._begin(CheckpointRun())

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to this process: its folder and signals."""
        return {**vars(self), "_folder": None, "_interrupt": DeferredInterrupt()}

    # Where and whether.

    @property
    def run_id(self) -> str:
        """The run that the checkpoints are of, in every resume of it."""
        return self._run.id

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

    @property
    def best_model_path(self) -> str:
        """Path of the best checkpoint; before a fit, of what an earlier process has saved."""
        path: str = vars(self).get("best_model_path", "")
        if path or self._run.is_begun or not self.dirpath:
            return path
        folder = Folder(self.dirpath, self.storage_options)
        return self._best_of_earlier.path(folder, self.monitor, self.mode)

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        vars(self)["best_model_path"] = path

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            dirpath = lightning_resume.resolve_checkpoint_dir(self, trainer)
            self.dirpath = trainer.strategy.broadcast(dirpath)
            return
        self.dirpath = trainer.strategy.broadcast(self._given_dir(trainer))
        checks.check_strategy(trainer.strategy)
        self._untold_fields = check_names(self)  # all of it may have been set since
        bring(ExactResume, trainer, pl_module, stage)
        run = run_of(trainer, (each._run for each in self._of_one_run(trainer)))
        if run is not self._run:
            self._begin(run)
        checks.on_rank_zero(trainer, partial(checks.check_folders, self, trainer))
        self._close(self.flush_timeout_s)  # of a fit that was not torn down

    def _given_dir(self, trainer: Trainer) -> str:
        """The folder that the user named, or ModelCheckpoint chooses, and no version of it."""
        given, written = self._placed
        if written and self.dirpath == written:
            return given
        return str(lightning_resume.resolve_checkpoint_dir(self, trainer))

    def _of_one_run(self, trainer: Trainer) -> "list[AsyncCheckpoint]":
        ours = [each for each in trainer.checkpoint_callbacks if isinstance(each, AsyncCheckpoint)]
        return ours or [self]

    def _begin(self, run: CheckpointRun) -> None:
        mode = self.mode if self.monitor is not None else "max"
        self._run = run
        self._last_global_step_saved = 0  # of an earlier run, whose steps were others
        self._retention = Retention(self.save_top_k, mode, bool(self.save_last))
        self._publish()

    def _open(self, trainer: Trainer) -> None:
        """Open the folder of the run, once it is known which one this is; on every rank."""
        given = self._given_dir(trainer)
        checks.on_rank_zero(trainer, partial(self._open_on_rank_zero, given, trainer))
        self.dirpath = trainer.strategy.broadcast(self.dirpath)
        self._placed = (given, str(self.dirpath))

    def _open_on_rank_zero(self, given: str, trainer: Trainer) -> None:
        path = str(trainer.ckpt_path) if trainer.ckpt_path else None
        options: dict[str, Any] = {"storage_options": self.storage_options}
        place = place_of(given, self.run_id, ckpt_path=path, overwrite=self.overwrite, **options)
        self._close(self.flush_timeout_s)
        self.dirpath = place.dirpath
        self._folder = CheckpointFolder(
            place.dirpath,
            self._retention,
            backpressure=self.backpressure,
            on_change=self._publish,
            others=place.others,
            commits_before=place.commits_before,
            **options,
        )
        self._run.saves = max(self._run.saves, self._folder.saves_of_run)

    def _publish(self) -> None:
        """Name what is committed, and nothing else; on the writing thread, too."""
        self.__dict__.update(self._standing(self._retention))

    def _standing(self, retention: Retention) -> dict[str, Any]:
        path = partial(path_in, str(self.dirpath), storage_options=self.storage_options)
        return standing(retention, path, monitored=self.monitor is not None)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._open_if_closed(trainer)

    def _open_if_closed(self, trainer: Trainer) -> None:
        if not trainer.strategy.broadcast(self._folder is not None) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._open(trainer)

    # When.

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open_if_closed(trainer)  # a strategy that restores late tells only now what run it is
        self._triggers.start()
        self._interrupt.start(trainer, defer=self.save_on_exception)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        news.tell_of_commits(self, self._folder, trainer)
        now, self._saves_now = self._saves_now, False
        self._save_if_due(trainer, self._triggers.after_batch(trainer) or now)
        self._interrupt.stop_if_it_came(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._interrupt.stop_if_it_came(trainer, defer=False)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        counts = not self._should_save_on_train_epoch_end(trainer)
        self._save_if_due(trainer, self._triggers.after_validation_or_epoch(trainer, counts))
        self._interrupt.stop_if_it_came(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        news.tell_of_commits(self, self._folder, trainer)
        counts = self._should_save_on_train_epoch_end(trainer)
        self._save_if_due(trainer, self._triggers.after_validation_or_epoch(trainer, counts))

    def _save_if_due(self, trainer: Trainer, comes_due: bool) -> None:
        comes_due = comes_due and self._last_global_step_saved != trainer.global_step
        logged = partial(self._monitor_candidates, trainer)
        metrics = self._triggers.metrics_to_save(trainer, comes_due, logged, self.monitor)
        if metrics is not None:
            self._save(trainer, metrics, score_of(metrics, self.monitor, self.mode))

    def withdraw(self, trainer: Trainer) -> list[str]:
        """Take back what was saved behind the batch that the run has just gone back to.

        None of it is best or ``last`` again, not even after a crash, and all of it goes once a
        newer checkpoint is committed. If nothing else is left, one is saved in this hook.

        Args:
            trainer: Whose run has gone back, in ``on_train_batch_end``; on every rank.

        Returns:
            Paths of the checkpoints, on rank zero.
        """
        self._triggers.forget()
        self._last_global_step_saved = 0  # a step may come, and be saved, once more
        names = [] if self._folder is None else self._folder.withdraw(batches_consumed(trainer))
        self._saves_now = trainer.strategy.broadcast(bool(names) and not self._retention.newest)
        return [path_in(str(self.dirpath), name, self.storage_options) for name in names]

    # What.

    def _save(
        self, trainer: Trainer, metrics: dict[str, Tensor], score: float | None, keep: bool = False
    ) -> None:
        """Save what is among the best, the newest if that is wanted, and what is to be kept."""
        ranked = trainer.is_global_zero and score is not None and self._retention.admits(score)
        wanted = ranked or (trainer.is_global_zero and (keep or bool(self.save_last)))
        if not trainer.strategy.reduce_boolean_decision(wanted, all=False):
            news.tell_of_what_was_not_saved(self, trainer, score)
            return
        start, name = time.perf_counter(), ""
        if self._folder is not None:
            formatted = partial(formatted_name, self, dict(metrics))  # which it fills up
            rank = score if ranked else None
            name = self._folder.reserve(formatted, self.STARTING_VERSION, rank, keep)
        checkpoint = lightning_resume.dump_checkpoint(trainer, self.save_weights_only)  # collective
        self._last_global_step_saved = trainer.global_step
        if self._folder is None:
            return
        self._untold_fields -= warn_of_unlogged(str(self.filename), self._untold_fields, metrics)
        metadata = self._run.metadata(trainer, self.monitor, score)
        result = self._folder.save(checkpoint, name, trainer.global_step, metadata)
        stall_s, copied = time.perf_counter() - start, float(result.copied_bytes)
        news.log(trainer, stall_s=stall_s, bytes=copied, skipped=float(result.skipped))

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[RUN_KEY] = self._run.entry(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        """As it will be where this can be read: once what is being written now is committed."""
        expected = self._standing(self._retention.expected())
        return {**super().state_dict(), **expected, "retention": self._retention.state_dict()}

    # The end of a run.

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            self._interrupt.release()
        self._interrupt.uninstall()
        if self.save_last and not self._last_global_step_saved and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer, self._monitor_candidates(trainer), None)
        news.tell_of_rest(self, self._folder, trainer, None)
        standing = trainer.strategy.broadcast(self._standing(self._retention))
        self.__dict__.update(standing)  # fit(ckpt_path="best") asks on every rank

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._interrupt.uninstall()
        if self._folder is None and trainer.world_size == 1:
            return
        try:
            if self._should_save_on_exception(trainer) and may_save_after(
                trainer, exception, self._interrupt.is_shared
            ):
                score = float(trainer.global_step) if self.monitor is None else None
                self._save(trainer, self._monitor_candidates(trainer), score, keep=True)
                step = trainer.global_step
                rank_zero_info(f"AsyncCheckpoint: saved step {step} before stopping.")
            news.tell_of_rest(self, self._folder, trainer, self.flush_timeout_s)
        except Exception as error:  # never in place of what training raised
            rank_zero_warn(f"AsyncCheckpoint: nothing was saved after {exception!r}: {error!r}.")
        finally:
            self._close(self.flush_timeout_s)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._interrupt.uninstall()
        self._close(None)

    def _close(self, timeout_s: float | None) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.close(timeout_s)

    # Resuming.

    @override
    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """What ``ckpt_path="last"`` may choose from; Lightning asks before loggers start a run.

        The first callback answers for all, since Lightning would go by the time of the files, which
        a copy of them changes.
        """
        ours = self._of_one_run(trainer)
        if ours[0] is not self:
            return set()
        places = [(each._given_dir(trainer), each.storage_options) for each in ours]
        return continue_newest(trainer, places)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if RUN_KEY not in checkpoint or trainer.state.fn != "fit":
            return
        self._run.resume(checkpoint[RUN_KEY], trainer)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._open(trainer)
        path, step = str(trainer.ckpt_path or ""), checkpoint["global_step"]
        is_a_tuners = Path(path).name.startswith((".lr_find_", ".scale_batch_size_"))
        if self._folder is not None and path and not is_a_tuners:  # else nothing is left behind
            self._folder.continue_from(path, step, self.run_id)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.dirpath != state_dict["dirpath"]:
            if self._run.is_begun:  # else nothing is saved: a validation of a version's checkpoint
                rank_zero_warn(
                    f"AsyncCheckpoint: dirpath was {state_dict['dirpath']!r} and is"
                    f" {self.dirpath!r}: what is best and what is kept start anew."
                )
            return
        found = committed_checkpoints(str(self.dirpath), self.storage_options)
        names = {manifest.name for manifest in found}
        surplus = self._retention.load_state_dict(state_dict["retention"], names)
        self._publish()
        if self._folder is not None:
            self._folder.delete(surplus)
