"""Private APIs of Lightning's records of what is logged."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultMetric,
    _Sync,
)
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

_PLAIN_METADATA = (
    *("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph"),
    *("add_dataloader_idx", "dataloader_idx", "metric_attribute"),
)


_SUMS = ("value", "cumulated_batch_size", "_forward_cache")


_OF_METRICS = ("_forward_cache",)  # the value of the last step, which Lightning logs until the next


def capture_logged_sums(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """What ``self.log`` has summed up in this training epoch, as plain data."""
    captured = {}
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        meta = result.meta
        if meta.sync.group is not None:
            continue  # a process group cannot be written down
        plain = {name: getattr(meta, name) for name in _PLAIN_METADATA}
        names = _SUMS if result.is_tensor else _OF_METRICS
        sums = {name: getattr(result, name, None) for name in names}
        captured[key] = {
            **plain,
            "reduce_fx": meta.reduce_fx.__name__,
            "sync_dist": meta.sync.should,
            "rank_zero_only": meta.sync.rank_zero_only,
            "is_tensor": result.is_tensor,
            "has_reset": result.has_reset,
            "updates": result._update_count,
            "sums": {
                name: value.detach().to("cpu", copy=True)
                for name, value in sums.items()
                if isinstance(value, Tensor)
            },
        }
    return captured


def restore_logged_sums(trainer: pl.Trainer, captured: dict[str, dict[str, Any]]) -> None:
    """Let ``self.log`` go on with what it had summed up."""
    module = trainer.lightning_module
    for key, plain in captured.items():
        meta = _Metadata(
            **{name: plain[name] for name in _PLAIN_METADATA},
            reduce_fx=getattr(torch, plain["reduce_fx"]),
        )
        meta.sync = _Sync(
            fn=trainer.strategy.reduce,
            _should=plain["sync_dist"],
            rank_zero_only=plain["rank_zero_only"],
        )
        result = _ResultMetric(meta, plain["is_tensor"])
        for name, value in plain["sums"].items():
            setattr(result, name, value.to(module.device, copy=True))
        if not plain["is_tensor"]:
            result.value = module.get_submodule(plain["metric_attribute"])
        result.has_reset, result._update_count = plain["has_reset"], plain["updates"]
        trainer.fit_loop.epoch_loop._results[key] = result
    # In the first batch of a process Lightning empties what a hook has logged before.
    trainer._logger_connector._first_loop_iter = False


def lightnings_line(trainer: pl.Trainer) -> int:
    """By which number Lightning logs next; where a run goes back it does not."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def line_number(trainer: pl.Trainer) -> int:
    """By which number of ours: that of optimizer steps, or a larger one where a run went back."""
    return max(trainer.global_step, lightnings_line(trainer))


def forget_logged(trainer: pl.Trainer) -> None:
    """Let nothing be logged yet in this training epoch, and no monitor see a value.

    What ``capture_logged_sums`` leaves out stays.
    """
    results = trainer.fit_loop.epoch_loop._results
    for key in [key for key, result in results.items() if result.meta.sync.group is None]:
        del results[key]
    latest_metrics(trainer).clear()


def logged_in_training(trainer: pl.Trainer, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those metrics that come from a hook of training, not of validation."""
    results = trainer.fit_loop.epoch_loop._results.values()
    names = {result.meta.name for result in results}
    return {name: value for name, value in metrics.items() if name in names}


def logged_metrics_of_epoch(trainer: pl.Trainer) -> list[Metric]:
    """The torchmetrics objects that ``self.log`` was given; Lightning resets them at its end."""
    return _logged_metrics(trainer.fit_loop.epoch_loop._results)


def logged_metrics_of_validation(trainer: pl.Trainer) -> list[Metric]:
    """Those of the validation that runs now, if one does; Lightning resets them at its end."""
    return _logged_metrics(
        trainer.fit_loop.epoch_loop.val_loop._results if trainer.validating else {}
    )


def _logged_metrics(results: Any) -> list[Metric]:
    return [result.value for result in results.values() if not result.is_tensor]


def capture_metric(metric: Metric) -> dict[str, Any]:
    """State of a torchmetrics object, which ``state_dict`` leaves out by default."""
    states = apply_to_collection(
        metric.metric_state, Tensor, lambda value: value.detach().to("cpu", copy=True)
    )
    return {"updates": metric._update_count, "states": states}


def restore_metric(metric: Metric, captured: dict[str, Any]) -> None:
    """Put the state of ``capture_metric`` back."""
    moved = apply_to_collection(captured["states"], Tensor, Tensor.to, metric.device, copy=True)
    for name, value in moved.items():
        setattr(metric, name, value)
    metric._update_count, metric._computed = captured["updates"], None


def latest_metrics(trainer: pl.Trainer) -> dict[str, Tensor]:
    """What monitors see, kept from one epoch to the next; the dictionary itself."""
    return trainer._logger_connector._callback_metrics


@contextmanager
def logging_apart(trainer: pl.Trainer) -> Iterator[None]:
    """Around a training step whose values nobody is to see: not monitors, means nor loggers."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    kept = {name: _copied(value) for name, value in vars(connector).items()}
    results, loggers = loop._results, trainer.loggers
    loop._results = type(results)(training=True)
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        loop._results, trainer.loggers = results, loggers
        vars(connector).update(kept)


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value
