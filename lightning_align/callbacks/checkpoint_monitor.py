"""The value that ranks AsyncCheckpoint's checkpoints, and what happens while nobody logs it.

As ModelCheckpoint has it: a value that no validation had the chance to log is waited for, one that
a validation has left out is a mistake.
"""

import math
from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_align._compat import lightning_resume
from lightning_align._errors import argument_error


def score_of(metrics: Mapping[str, Tensor], monitor: str | None, mode: str) -> float:
    """What a checkpoint is ranked by: NaN is the worst value that there is.

    Args:
        metrics: What was logged.
        monitor: Name of the value; None ranks by the step.
        mode: Whether the ``min`` or the ``max`` value is best.
    """
    if monitor is None:
        return float(metrics["step"])
    score = float(metrics.get(monitor, math.nan))
    worst = math.inf if mode == "min" else -math.inf
    return worst if math.isnan(score) else score


def is_logged(trainer: pl.Trainer, monitor: str, metrics: Mapping[str, Tensor]) -> bool:
    """Whether rank 0, which ranks the checkpoints, has the value. Collective, as saving is.

    Others may not have it: ``self.log(..., rank_zero_only=True)``.

    Args:
        trainer: Whose ranks they are.
        monitor: Name of the value.
        metrics: What was logged.
    """
    return trainer.strategy.broadcast(monitor in metrics)


def check_logged(trainer: pl.Trainer, monitor: str, metrics: Mapping[str, Tensor]) -> None:
    """Warn that a value is not there yet, where it was to rank a checkpoint.

    Args:
        trainer: Tells whether a validation has run.
        monitor: Name of the value.
        metrics: What was logged.

    Raises:
        ValueError: If a validation has run and did not log it.
    """
    rule = f"was not logged; these values were: {sorted(metrics)}"
    way_out = f"Log it with self.log({monitor!r}, ...)"
    error = argument_error("AsyncCheckpoint", "monitor", monitor, rule, way_out)
    if lightning_resume.validation_has_run(trainer):
        raise error
    rank_zero_warn(f"Nothing is saved at step {trainer.global_step}. {error}")
