"""When AsyncCheckpoint saves: what is due, and what a save that is due still waits for."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_align._compat import lightning_logged
from lightning_align.callbacks.checkpoint_monitor import check_logged, is_logged
from lightning_align.run.accumulation import is_safe_point


@dataclass
class SaveTriggers:
    """A save comes due at a step, an epoch or a time, and is made once that is safe.

    Args:
        every_n_train_steps: Optimizer steps between saves, or 0.
        train_time_interval: Time between saves, or None.
        every_n_epochs: Epochs between saves, or 0.
    """

    every_n_train_steps: int
    train_time_interval: timedelta | None
    every_n_epochs: int

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin to train: nothing is due, and time counts from now."""
        self._due: dict[str, Tensor] | None = None  # the metrics when a save became due
        self._awaits_validation = False
        self._last_time = time.monotonic()

    def forget(self) -> None:
        """Nothing is due any more: the run has gone back."""
        self._due, self._awaits_validation = None, False

    def after_batch(self, trainer: pl.Trainer) -> bool:
        """Whether this batch makes a save due. Collective where time does.

        Args:
            trainer: Who trains.
        """
        every_n, interval = self.every_n_train_steps, self.train_time_interval
        by_step = every_n > 0 and trainer.global_step % every_n == 0
        return by_step or (interval is not None and self._time_is_up(trainer, interval))

    def _time_is_up(self, trainer: pl.Trainer, interval: timedelta) -> bool:
        now = time.monotonic()
        up = now - self._last_time >= interval.total_seconds()
        if trainer.world_size > 1:
            up = trainer.strategy.broadcast(up)  # clocks differ, and saving is collective
        if up:
            self._last_time = now
        return up

    def after_validation_or_epoch(self, trainer: pl.Trainer, counts: bool) -> bool:
        """Whether this makes a save due, or brings what one waits for.

        Args:
            trainer: Who trains.
            counts: Whether this is the one of the two that epochs are counted by.
        """
        every_n = self.every_n_epochs
        by_epoch = counts and every_n >= 1 and (trainer.current_epoch + 1) % every_n == 0
        return by_epoch or self._awaits_validation

    def metrics_to_save(
        self,
        trainer: pl.Trainer,
        comes_due: bool,
        logged: Callable[[], dict[str, Tensor]],
        monitor: str | None,
    ) -> dict[str, Tensor] | None:
        """What was logged of the step that is to be saved now; None if nothing is.

        Args:
            trainer: Who trains.
            comes_due: Whether a save has come due, if none was.
            logged: Returns what is logged now.
            monitor: Name of the value that must be among it.

        Raises:
            ValueError: If a validation has run and did not log it.
        """
        if comes_due:
            self._due = logged()
        if self._due is None or trainer.fast_dev_run or not is_safe_point(trainer):  # type: ignore[attr-defined]
            return None
        # Where the save had to wait, what a training step logged is of that step; the validation
        # that came since is of the same weights.
        metrics = {**logged(), **lightning_logged.logged_in_training(trainer, self._due)}
        self._due, self._awaits_validation = None, False
        if monitor is None or is_logged(trainer, monitor, metrics):
            return metrics
        # A step's save waits for the validation that logs the value; an epoch's comes again anyway.
        self._awaits_validation = self.every_n_epochs == 0
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if not trainer.training or epochs.processed == epochs.started:  # the epoch is closed
            check_logged(trainer, monitor, metrics)
        return None


def may_save_after(trainer: pl.Trainer, exception: BaseException, stopped_together: bool) -> bool:
    """Whether an exception has left a state that is worth saving, and every rank would save it.

    Args:
        trainer: Who trained.
        exception: What was raised; in mid-batch it is warned of.
        stopped_together: Whether all ranks have stopped at the same batch: saving is collective.
    """
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if batches.ready != batches.processed:
        rank_zero_warn(
            f"AsyncCheckpoint: {type(exception).__name__} came in the middle of a batch, whose"
            " update may be half done; only what was saved before is kept."
        )
        return False
    return trainer.world_size == 1 or stopped_together
