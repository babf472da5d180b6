"""Sums behind the epoch means of logged values, and the metrics that monitors look at.

``self.log(..., on_epoch=True)`` adds up the values of an epoch, and Lightning leaves the sums, the
state of torchmetrics objects and the latest value of every metric out of its checkpoints: after a
resume in mid-epoch the mean would be one of the rest of the epoch, and a monitor of ``val_loss``
would find nothing. Each rank has sums of its own.
"""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_align._compat import lightning_logged
from lightning_align.run.position import epoch_is_open, next_place
from lightning_align.run.replicas import of_every_rank

Means = dict[str, Any]


def capture_means(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Means]:
    """What every rank has summed up so far. Collective: every rank must call it."""
    return of_every_rank(trainer, own_means(trainer, pl_module))


def own_means(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Means:
    """What this rank has summed up so far."""
    loops = trainer.fit_loop.state_dict()
    epoch_goes_on = next_place(loops).batch > 0 or epoch_is_open(loops)
    reset_by_lightning = lightning_logged.logged_metrics_of_validation(trainer)
    if not epoch_goes_on:
        reset_by_lightning += lightning_logged.logged_metrics_of_epoch(trainer)
    # Reading the property computes the means of a closed epoch, which plateau schedulers look at.
    latest = lightning_logged.latest_metrics(trainer) if epoch_goes_on else trainer.callback_metrics
    return {
        "sums": lightning_logged.capture_logged_sums(trainer) if epoch_goes_on else {},
        "metrics": {
            name: lightning_logged.capture_metric(metric)
            for name, metric in _metrics(pl_module).items()
            if metric.update_called and not any(metric is reset for reset in reset_by_lightning)
        },
        "latest": {
            name: value.detach().to("cpu", copy=True)
            for name, value in latest.items()
            if isinstance(value, Tensor)
        },
    }


def restore_means(
    trainer: pl.Trainer, pl_module: pl.LightningModule, captured: list[Means]
) -> None:
    """Let this rank go on with its sums."""
    if not captured:
        return
    means = captured[min(trainer.global_rank, len(captured) - 1)]
    _restore_latest(trainer, means)
    if len(captured) != trainer.world_size:
        if means["sums"] or means["metrics"]:
            rank_zero_warn(
                f"The checkpoint was written by {len(captured)} rank(s) and is resumed by"
                f" {trainer.world_size}: means of this epoch's logged values are of its rest only."
            )
        return
    _restore_sums(trainer, pl_module, means)


def replace_means(trainer: pl.Trainer, pl_module: pl.LightningModule, means: Means) -> None:
    """Let this rank go on with these sums in mid-fit, and with nothing that came after them.

    Args:
        trainer: Who fits.
        pl_module: What is fitted.
        means: From ``own_means``.
    """
    lightning_logged.forget_logged(trainer)
    for metric in _metrics(pl_module).values():
        metric.reset()
    _restore_latest(trainer, means)
    _restore_sums(trainer, pl_module, means)


def _restore_latest(trainer: pl.Trainer, means: Means) -> None:
    device = trainer.lightning_module.device
    latest = {name: value.to(device, copy=True) for name, value in means["latest"].items()}
    lightning_logged.latest_metrics(trainer).update(latest)


def _restore_sums(trainer: pl.Trainer, pl_module: pl.LightningModule, means: Means) -> None:
    metrics = _metrics(pl_module)
    for name, state in means["metrics"].items():
        if name in metrics:
            lightning_logged.restore_metric(metrics[name], state)
    if means["sums"]:
        lightning_logged.restore_logged_sums(trainer, means["sums"])


def _metrics(pl_module: pl.LightningModule) -> dict[str, Metric]:
    return {name: m for name, m in pl_module.named_modules() if isinstance(m, Metric)}
