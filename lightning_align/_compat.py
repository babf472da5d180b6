"""Every private API of other libraries that we touch, with a test each.

When one of them changes, ``tests/test_compat.py`` names it before a user meets it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import _typehints
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultMetric,
    _Sync,
)
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.combined_loader import _shutdown_workers_and_reset_iterator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchmetrics import Metric


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether gradients of the current window still wait for their optimizer step."""
    return trainer.fit_loop._should_accumulate()


def restart_train_iteration(trainer: pl.Trainer) -> None:
    """Start the training data loader anew, so that its sampler reads the position again."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)


def begin_epoch(trainer: pl.Trainer) -> None:
    """Let the loop over batches begin instead of going on; with ``max_steps`` it goes on."""
    trainer.fit_loop.epoch_loop.restarting = False


def load_pending_loader_states(trainer: pl.Trainer) -> bool:
    """Hand stateful loaders the states of the checkpoint if Lightning has not yet done so.

    It has not where something asked for the loaders before the loops were restored.
    """
    loop = trainer.fit_loop
    pending = bool(loop._combined_loader_states_to_load) and loop.restarting
    loop._load_combined_loader_states()
    return pending


def wrap_train_loaders(trainer: pl.Trainer, wrap: Callable[[Any], CombinedLoader] | None) -> None:
    """Let Lightning iterate over ``wrap(what train_dataloader returned)``; None undoes it."""
    source: Any = trainer.fit_loop._data_source
    vars(source).pop("dataloader", None)
    if wrap is not None:
        request = source.dataloader
        source.dataloader = lambda: wrap(request())


def train_loaders(trainer: pl.Trainer) -> CombinedLoader | None:
    """What the training loop iterates over."""
    return trainer.fit_loop._combined_loader


def combined_mode(loaders: CombinedLoader) -> str:
    """How several loaders are combined."""
    return loaders._mode


def shut_down_workers(loader: DataLoader[Any]) -> None:
    """End persistent workers, so that the next iteration starts new ones."""
    _shutdown_workers_and_reset_iterator(loader)


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether a validation runs between this training batch and the next one."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


_PLAIN_METADATA = (
    *("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph"),
    *("add_dataloader_idx", "dataloader_idx", "metric_attribute"),
)
_SUMS = ("value", "cumulated_batch_size")


def capture_logged_sums(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """What ``self.log`` has summed up in this training epoch, as plain data."""
    captured = {}
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        meta = result.meta
        if meta.sync.group is not None:
            continue  # a process group cannot be written down
        plain = {name: getattr(meta, name) for name in _PLAIN_METADATA}
        sums = {name: getattr(result, name, None) for name in _SUMS} if result.is_tensor else {}
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
                if value is not None
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


def logged_metrics_of_epoch(trainer: pl.Trainer) -> list[Metric]:
    """The torchmetrics objects that ``self.log`` was given; Lightning resets them at its end."""
    results = trainer.fit_loop.epoch_loop._results.values()
    return [result.value for result in results if not result.is_tensor]


def capture_metric(metric: Metric) -> dict[str, Any]:
    """State of a torchmetrics object, which ``state_dict`` leaves out by default."""
    states = {
        name: [item.detach().to("cpu", copy=True) for item in value]
        if isinstance(value, list)
        else value.detach().to("cpu", copy=True)
        for name, value in metric.metric_state.items()
    }
    return {"updates": metric._update_count, "states": states}


def restore_metric(metric: Metric, captured: dict[str, Any]) -> None:
    """Put the state of ``capture_metric`` back."""
    for name, value in captured["states"].items():
        moved = (
            [item.to(metric.device, copy=True) for item in value]
            if isinstance(value, list)
            else value.to(metric.device, copy=True)
        )
        setattr(metric, name, moved)
    metric._update_count, metric._computed = captured["updates"], None


def latest_metrics(trainer: pl.Trainer) -> dict[str, Tensor]:
    """What monitors see, kept from one epoch to the next; the dictionary itself."""
    return trainer._logger_connector._callback_metrics


def wrap_in_ddp_again(strategy: DDPStrategy, module: pl.LightningModule) -> None:
    """Let DDP reduce the gradients of what requires one now, and of nothing else.

    The old wrapper leaves its hooks behind at every parameter it saw. A new one sends all weights
    of rank 0 to the others first, which have them already.
    """
    if isinstance(strategy.model, DistributedDataParallel):
        strategy.model._remove_autograd_hooks()  # type: ignore[no-untyped-call]
    given = strategy._ddp_kwargs
    strategy._ddp_kwargs = {**given, "init_sync": False}
    try:
        strategy.model = module
        strategy.configure_ddp()
    finally:
        strategy._ddp_kwargs = given


def built_by_cli() -> bool:
    """Whether a module's ``__init__`` runs in LightningCLI, which knows its arguments as data."""
    return _given_hyperparameters.get() is not None


def log_step_value(
    module: pl.LightningModule, name: str, value: Tensor, *, prog_bar: bool = False
) -> None:
    """``module.log`` of a detached scalar of this step, at a thirtieth of its time.

    Each call of ``log`` copies the record of what is logged, field by field, which takes 0.5 ms of
    CPU time, and a step logs six values or more. After the first step only the value is new.
    """
    hook = module._current_fx_name
    results = module.trainer._results
    key = f"{hook}.{name}"
    # A new epoch forgets what the hook has logged; only ``log`` knows when.
    forgets = hook is None or module.trainer._logger_connector.should_reset_tensors(hook)
    if results is None or key not in results or forgets:
        module.log(name, value, prog_bar=prog_bar)
    else:
        results.update_metrics(key, value, batch_size=1)


@contextmanager
def whole_class_switches(notice: Callable[[str, str, list[str]], None]) -> Iterator[None]:
    """Let no argument of a class reach another one that a later layer of configuration chose.

    jsonargparse hands on every argument whose name the new class accepts as well: weight_decay
    of an AdamW to an SGD, the monitor of a ModelCheckpoint to an EarlyStopping.

    Args:
        notice: Called with the old class path, the new one and the names of the arguments that
            were dropped; for one switch more than once, because parsing goes in rounds.
    """
    inherit = _typehints.discard_init_args_on_class_path_change

    def discard(_: object, previous: Any, value: Any) -> None:
        if previous and "init_args" in previous and previous["class_path"] != value["class_path"]:
            names = list(dict(previous["init_args"].items(branches=True, nested=False)))
            for name in names:
                previous["init_args"].pop(name)
            if names:
                notice(previous["class_path"], value["class_path"], names)

    _typehints.discard_init_args_on_class_path_change = discard
    try:
        yield
    finally:
        _typehints.discard_init_args_on_class_path_change = inherit
