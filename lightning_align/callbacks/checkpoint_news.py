"""What AsyncCheckpoint says: to loggers, of a save and of its commit, and to who reads along."""

from typing import Any
from weakref import proxy

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_align._compat import lightning_logged
from lightning_align.callbacks.checkpoint_folder import CheckpointFolder
from lightning_align.checkpointing import Commit


def log(trainer: pl.Trainer, **values: float) -> None:
    """Log values of a checkpoint.

    Args:
        trainer: Whose loggers hear of them.
        **values: By name, without the prefix.
    """
    metrics = {f"checkpoint/{name}": value for name, value in values.items()}
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=lightning_logged.line_number(trainer))


def tell_of_commits(
    callback: ModelCheckpoint, folder: CheckpointFolder | None, trainer: pl.Trainer
) -> None:
    """Tell, on the training thread, what the writing thread did since the last call.

    Args:
        callback: Names what is committed.
        folder: Where that was; None on a process that does not write.
        trainer: Whose loggers hear of it.
    """
    if folder is None:
        return
    for commit in folder.new_commits():
        log(trainer, persist_s=commit.persist_s)
        if callback.verbose:
            _tell_of_commit(callback, commit)
        for logger in trainer.loggers:
            logger.after_save_checkpoint(proxy(callback))
    for error in folder.new_errors():
        rank_zero_warn(f"AsyncCheckpoint: {error.message} Training goes on.")


def _tell_of_commit(callback: ModelCheckpoint, commit: Commit) -> None:
    about: dict[str, Any] = commit.manifest.metadata
    reached = ""
    if about["score"] is not None and callback.best_model_score is not None:
        best = float(callback.best_model_score)
        reached = f" {callback.monitor!r} reached {about['score']:.5f} (best {best:.5f}),"
    where = f"Epoch {about['epoch']}, global step {commit.manifest.step}"
    rank_zero_info(f"{where}:{reached} saved {commit.path!r}")


def tell_of_rest(
    callback: ModelCheckpoint,
    folder: CheckpointFolder | None,
    trainer: pl.Trainer,
    timeout_s: float | None,
) -> None:
    """Wait for what is being written, and tell of it and of what was not written in this run.

    Args:
        callback: Names what is committed.
        folder: Where that is; None on a process that does not write.
        trainer: Whose loggers hear of it.
        timeout_s: Seconds to wait; None has no limit.
    """
    if folder is None:
        return
    folder.wait(timeout_s)
    tell_of_commits(callback, folder, trainer)
    if folder.num_failed:
        complete = callback.last_model_path or "none"
        rank_zero_warn(
            f"AsyncCheckpoint: {folder.num_failed} of {folder.num_saved}"
            f" checkpoints of this run were not written. Last complete checkpoint: {complete}."
        )


def tell_of_what_was_not_saved(
    callback: ModelCheckpoint, trainer: pl.Trainer, score: float | None
) -> None:
    """Tell, if that is wanted, of a score that is not among the best.

    Args:
        callback: Has not saved it.
        trainer: Has come to it.
        score: The value.
    """
    if callback.verbose:
        rank_zero_info(
            f"Epoch {trainer.current_epoch}, global step {trainer.global_step}:"
            f" {callback.monitor!r} was {score}, not in top {callback.save_top_k}"
        )
