"""Private APIs of Lightning that resuming and checkpoints touch."""

import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
from lightning.fabric.strategies import model_parallel
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.combined_loader import (
    _SUPPORTED_MODES,
    _shutdown_workers_and_reset_iterator,
)
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.checkpoint import state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_align._compat.torch_modules import SHARDING


def begin_epoch(trainer: pl.Trainer) -> None:
    """Let the loop over batches begin instead of going on; with ``max_steps`` it goes on."""
    trainer.fit_loop.epoch_loop.restarting = False


def finish_epoch(trainer: pl.Trainer) -> None:
    """Let a loop that restarts behind an epoch's last batch run what is left of the epoch.

    Where no validation is due, it would train another batch to look for one; and where it
    restarts, it does not step the schedulers that watch a metric.
    """
    loop = trainer.fit_loop
    loop._restarting = False
    if not validation_follows(trainer):
        loop.epoch_loop.val_loop._has_run = True
        loop.epoch_loop._batches_that_stepped += 1


def call_before_epochs(trainer: pl.Trainer, function: Callable[[], None]) -> None:
    """Call a function once, behind all hooks of the start of training and before any of an epoch.

    No hook is there: where a run goes on in mid-epoch, no ``on_train_epoch_start`` is called.
    """
    loop: Any = trainer.fit_loop

    def once() -> None:
        vars(loop).pop("on_advance_start")
        function()
        loop.on_advance_start()

    loop.on_advance_start = once


def offer_module_hook(trainer: pl.Trainer, name: str, *arguments: Any) -> Callable[[], None]:
    """Return what calls a hook of the module early, before Lightning comes to it, and once in all.

    Lightning calls it after those of the callbacks, of which some save. In a save by the hook
    itself there is nothing left to call.
    """
    module = trainer.lightning_module
    if not is_overridden(name, module):
        return lambda: None
    hook, own, called = getattr(module, name), vars(module).get(name), False

    def restore() -> None:
        vars(module).pop(name)
        vars(module).update({} if own is None else {name: own})

    def once(*given: Any) -> Any:
        nonlocal called
        restore()
        before, called = called, True
        return None if before else hook(*given)

    def early() -> None:
        nonlocal called
        if not called:
            called = True
            restore()
            call._call_lightning_module_hook(trainer, name, *arguments)
            vars(module)[name] = once

    vars(module)[name] = once
    return early


def has_own_hook(owner: Any, name: str) -> bool:
    """Whether a LightningModule or callback has more than Lightning's empty hook of a name."""
    base = pl.Callback if isinstance(owner, pl.Callback) else pl.LightningModule
    return is_overridden(name, owner, parent=base)


def widen_before_restoring(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Convert a module for ``precision="64-true"`` before the weights of a checkpoint come.

    Lightning converts it behind them, when they have been rounded to the float32 that it was built
    in. Of narrower precisions nothing is lost by that.
    """
    if isinstance(trainer.precision_plugin, DoublePrecision):
        trainer.precision_plugin.convert_module(module)


def call_before_saving(trainer: pl.Trainer, function: Callable[[], None] | None) -> None:
    """Call a function whenever a checkpoint is about to be put together; None undoes it."""
    connector: Any = trainer._checkpoint_connector
    vars(connector).pop("dump_checkpoint", None)
    if function is not None:
        dump = connector.dump_checkpoint

        def call_and_dump(*arguments: Any, **options: Any) -> Any:
            function()
            return dump(*arguments, **options)

        connector.dump_checkpoint = call_and_dump


def offer_last(trainer: pl.Trainer, newest: Callable[[str | None], str | None]) -> None:
    """Let ``ckpt_path="last"`` be what a function makes of the newest checkpoint of callbacks.

    Lightning asks callbacks alone, before any hook of the strategy is called.

    Args:
        trainer: The trainer.
        newest: Given the path that Lightning found, or None, it returns the one to take.
    """
    connector: Any = trainer._checkpoint_connector
    vars(connector).pop("_parse_ckpt_path", None)
    connector._parse_ckpt_path = partial(_parse_or_last, connector._parse_ckpt_path, newest)


def _parse_or_last(
    parse: Callable[..., Any], newest: Callable[[Any], Any], fn: Any, path: Any, **options: Any
) -> Any:
    if path != "last":
        return parse(fn, path, **options)
    with warnings.catch_warnings():
        if newest(None) is not None:
            warnings.filterwarnings("ignore", message=".*there is no last checkpoint available.*")
        return newest(parse(fn, path, **options))


def read_checkpoints(
    trainer: pl.Trainer, read: Callable[[Any, bool | None], dict[str, Any] | None] | None
) -> None:
    """Let a function read checkpoints for strategies that leave that to Lightning; None undoes it.

    Args:
        trainer: The trainer.
        read: Given a path and ``weights_only``; None from it leaves the path to Lightning.
    """
    strategy: Any = trainer.strategy
    for name in ("load_checkpoint", "optimizer_state"):
        vars(strategy).pop(name, None)
    if read is None or type(strategy).load_checkpoint is not Strategy.load_checkpoint:
        return
    load = strategy.load_checkpoint

    def read_or_load(checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        found = read(checkpoint_path, weights_only)
        return load(checkpoint_path, weights_only) if found is None else found

    strategy.load_checkpoint = read_or_load


def around_sharded_optimizers(
    trainer: pl.Trainer,
    loading: Callable[..., AbstractContextManager[None]],
    asking: Callable[[Optimizer], AbstractContextManager[None]],
    by_name: Callable[[nn.Module, Optimizer, dict[str, Any]], dict[str, Any]],
) -> None:
    """Let a strategy that loads and asks parts of a sharded model do so in contexts.

    ``read_checkpoints`` with None undoes it.

    Args:
        trainer: The trainer.
        loading: Given the model, its optimizers, the path and ``weights_only``.
        asking: Around a question for the state of an optimizer, which it is given.
        by_name: What a file has of an optimizer, with names of parameters for its numbers.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    load, ask = strategy.load_checkpoint, strategy.optimizer_state

    def load_in_it(checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        path = Path(strategy.broadcast(checkpoint_path))
        if not path.exists():
            return load(path, weights_only)  # Lightning says so
        with (
            loading(strategy.model, strategy.optimizers, path, weights_only),
            _of_files(by_name),
        ):
            return load(path, weights_only)

    def ask_in_it(optimizer: Any) -> Any:
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        with asking(plain):
            return ask(plain)

    vars(strategy)["load_checkpoint"] = load_in_it
    vars(strategy)["optimizer_state"] = ask_in_it


@contextmanager
def _of_files(
    by_name: Callable[[nn.Module, Optimizer, dict[str, Any]], dict[str, Any]],
) -> Iterator[None]:
    """Give optimizers what a file has of them, of which Lightning expects a state in any order.

    Its ``_rekey_optimizer_state_if_needed`` looks at the first state, and counts the model's
    parameters; torch's ``set_optimizer_state_dict`` has no device to send none to.
    """
    theirs = state_dict.set_optimizer_state_dict

    def give(model: Any, optimizer: Any, *, optim_state_dict: Any, options: Any = None) -> None:
        if options is not None and options.full_state_dict:
            optim_state_dict = by_name(model, optimizer, optim_state_dict)
            if not optim_state_dict["state"]:
                groups = optim_state_dict["param_groups"]
                for group, saved in zip(optimizer.param_groups, groups, strict=True):
                    group.update({key: saved[key] for key in saved if key != "params"})
                return
        theirs(model, optimizer, optim_state_dict=optim_state_dict, options=options)

    with (
        mock.patch.object(
            model_parallel, "_rekey_optimizer_state_if_needed", lambda saved, _: saved
        ),
        mock.patch.object(state_dict, "set_optimizer_state_dict", give),
    ):
        yield


class _BlankMetric(Metric):
    def update(self) -> None:
        """Nothing."""

    def compute(self) -> None:
        """Nothing."""


# How transformers marks a model that it has put its hooks into, at the first forward that is asked
# for hidden states or router logits. A model that is built anew has none of these hooks.
_HOOKED_BY_TRANSFORMERS = "_output_capturing_hooks_installed"


@cache
def _own_attributes() -> dict[type, frozenset[str]]:
    in_checkpoints = {"_hparams_initial", "_hparams_name"}
    names = set(vars(pl.LightningModule())) | in_checkpoints
    return {
        pl.LightningModule: frozenset(names - {"_param_requires_grad_state"}),
        Metric: frozenset(vars(_BlankMetric())),
        nn.Module: frozenset(vars(nn.Module())),
    }


def own_attributes(module: nn.Module) -> frozenset[str]:
    """Names of attributes that are the affair of Lightning, torchmetrics, torch or transformers.

    Not among them are the hyperparameters, which Lightning saves and does not resume, and what
    ``toggle_optimizer`` has to undo.
    """
    own = next(names for kind, names in _own_attributes().items() if isinstance(module, kind))
    own |= {_HOOKED_BY_TRANSFORMERS, *SHARDING}
    return own | module._defaults.keys() if isinstance(module, Metric) else own


def lightning_optimizers(trainer: pl.Trainer) -> list[Any]:
    """What ``LightningModule.optimizers()`` returns."""
    return list(trainer.strategy._lightning_optimizers)


def training_modes(trainer: pl.Trainer) -> dict[str, bool]:
    """Which modules are in training mode while training, by name; also asked during validation."""
    if trainer.validating:
        return dict(trainer.fit_loop.epoch_loop.val_loop._module_mode.mode)
    return {name: part.training for name, part in trainer.lightning_module.named_modules()}


def sync_of_buffers(trainer: pl.Trainer, now: bool | None = None) -> bool:
    """Whether DDP's next forward takes rank zero's buffers; the one after a batch without does not.

    Args:
        trainer: Who trains.
        now: What it is to do.
    """
    model = trainer.strategy.model
    if not isinstance(model, DistributedDataParallel):
        return True
    if now is not None:
        model.require_forward_param_sync = now
    return model.require_forward_param_sync


def averaging_in_checkpoint(trainer: pl.Trainer) -> list[StochasticWeightAveraging]:
    """Callbacks that average weights and had begun to when the checkpoint was written."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averaging = [each for each in callbacks if isinstance(each, StochasticWeightAveraging)]
    return [each for each in averaging if each._scheduler_state is not None]


def resume_averaging(trainer: pl.Trainer, averaging: StochasticWeightAveraging) -> None:
    """Do what its hook of an epoch's beginning does; it puts a scheduler in the others' place.

    Building that scheduler sets learning rates, though they have been restored.
    """
    if (
        averaging._initialized
        or not averaging.swa_start <= trainer.current_epoch <= averaging.swa_end
    ):
        return
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    restored = [dict(group) for group in groups]
    averaging.on_train_epoch_start(trainer, trainer.lightning_module)
    for group, values in zip(groups, restored, strict=True):
        group.update(values)


def receive_sigterm(trainer: pl.Trainer) -> None:
    """Let the trainer stop after this batch as if the signal had come to this process."""
    trainer._signal_connector.received_sigterm = True


def replace_sigterm_notice(trainer: pl.Trainer, notice: Callable[[int, Any], None]) -> None:
    """Call ``notice`` where Lightning would broadcast that this process got a SIGTERM."""
    handler: Any = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, _HandlersCompose):
        lightnings = trainer._signal_connector._sigterm_notifier_fn
        handler.signal_handlers = [
            notice if each == lightnings else each for each in handler.signal_handlers
        ]


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


def forget_train_loaders(trainer: pl.Trainer) -> None:
    """Let ``fit_loop.setup_data`` ask for the training loaders once more."""
    trainer.fit_loop._combined_loader = None


def combined_mode(loaders: CombinedLoader) -> str:
    """How several loaders are combined."""
    return loaders._mode


def combined_length(loaders: CombinedLoader) -> int | None:
    """Batches of an epoch, None without a length; asked for before an iteration, unlike ``len``."""
    iterator = _SUPPORTED_MODES[loaders._mode]["iterator"]
    return sized_len(iterator(loaders.flattened, loaders.limits))


def shut_down_workers(loader: DataLoader[Any]) -> None:
    """End persistent workers, so that the next iteration starts new ones."""
    _shutdown_workers_and_reset_iterator(loader)


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether a validation runs between this training batch and the next one."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def validation_has_run(trainer: pl.Trainer) -> bool:
    """Whether the last validation of this fit came to a batch; the sanity check is none."""
    return trainer.fit_loop.epoch_loop.val_loop._has_run


def step_plateau_schedulers(trainer: pl.Trainer, interval: str) -> None:
    """Step every ``ReduceLROnPlateau`` of an interval by the metric that it monitors."""
    loop = trainer.fit_loop.epoch_loop
    loop.update_lr_schedulers(interval, update_plateau_schedulers=True)


def resolve_checkpoint_dir(callback: ModelCheckpoint, trainer: pl.Trainer) -> Any:
    """The folder that a ModelCheckpoint writes to, from dirpath, logger or default_root_dir."""
    return callback._ModelCheckpoint__resolve_ckpt_dir(trainer)  # type: ignore[attr-defined]


def saved_by(callback: ModelCheckpoint) -> tuple[int, set[str]]:
    """The step that a ModelCheckpoint has saved last, and the paths of what it keeps."""
    named = {callback.last_model_path, callback.best_model_path, callback._last_checkpoint_saved}
    return callback._last_global_step_saved, {*callback.best_k_models, *named} - {""}


def save_step_again(callback: ModelCheckpoint) -> None:
    """Let a ModelCheckpoint save a step that it has saved before."""
    callback._last_global_step_saved = 0


def dump_checkpoint(trainer: pl.Trainer, weights_only: bool) -> dict[str, Any]:
    """What ``trainer.save_checkpoint`` would write. Collective where the strategy's state is."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only)


@contextmanager
def only_callbacks(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> Iterator[None]:
    """Let a checkpoint be put together, or taken up, by these callbacks only."""
    owner: Any = trainer
    everyone, owner.callbacks = owner.callbacks, callbacks
    try:
        yield
    finally:
        owner.callbacks = everyone


@contextmanager
def state_in_parts(
    strategy: Strategy,
    take: Callable[[], dict[str, Any]],
    put: Callable[[Mapping[str, Any]], None],
) -> Iterator[None]:
    """Let a checkpoint be put together, or taken up, with what these functions have of a state.

    Args:
        strategy: Which is asked for the state of model and optimizers otherwise.
        take: Returns it, under Lightning's names in a checkpoint.
        put: Given such a checkpoint, puts it back.
    """
    taken: dict[str, Any] = {}

    def module_state() -> Any:
        taken.update(take())
        return taken["state_dict"]

    def optimizer_state(optimizer: Any) -> Any:
        return taken["optimizer_states"][strategy.optimizers.index(optimizer)]

    own = {
        "lightning_module_state_dict": module_state,
        "optimizer_state": optimizer_state,
        "load_model_state_dict": lambda checkpoint, **_: put(checkpoint),
        "load_optimizer_state_dict": lambda *_: None,
    }
    vars(strategy).update(own)
    try:
        yield
    finally:
        for name in own:
            vars(strategy).pop(name)


def restore_in_fit(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """Put back what ``dump_checkpoint`` gave, while loops run; returns the states of the loaders.

    Lightning means its loops to restart, which skips what running ones have yet to do. The number
    that loggers count by goes on.
    """
    connector, loop = trainer._checkpoint_connector, trainer.fit_loop
    lines = loop.epoch_loop._batches_that_stepped
    connector._loaded_checkpoint = checkpoint
    try:
        connector.restore_model()
        connector.restore_datamodule()
        connector.restore_callbacks()
        connector.restore_training_state()
    finally:
        connector._loaded_checkpoint = {}
    for each in _with_inner(loop):
        each.on_iteration_done()
    loop.epoch_loop._batches_that_stepped = max(lines, loop.epoch_loop._batches_that_stepped)
    states, loop._combined_loader_states_to_load = loop._combined_loader_states_to_load, []
    return states


def _with_inner(loop: _Loop) -> Iterator[_Loop]:
    yield loop
    for inner in vars(loop).values():
        if isinstance(inner, _Loop):
            yield from _with_inner(inner)


def restart_in_epoch(trainer: pl.Trainer, states: list[dict[str, Any]]) -> bool:
    """Start the training loader anew in an epoch whose counters have been put back.

    Args:
        trainer: Who trains.
        states: Of the loaders, if they have any.

    Returns:
        Whether it has another batch. If not, the present one ends the epoch: what Lightning does
        for such a batch before ``on_train_batch_end`` is done here.
    """
    loop: Any = trainer.fit_loop
    if states:
        loop._combined_loader._load_state_dicts(states)
    iter(loop._data_fetcher)
    loop._data_fetcher.fetched += loop.epoch_loop.batch_progress.current.ready
    if loop._data_fetcher.done:
        loop.epoch_loop.batch_progress.is_last_batch = True
        loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
    return not loop._data_fetcher.done


def wandb_run_id(trainer: pl.Trainer) -> str | None:
    """Id of the W&B run that the trainer logs to, if it does and it has begun."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            return logger._experiment.id if logger._experiment is not None else logger._id
    return None


def continue_wandb_run(trainer: pl.Trainer, run_id: str) -> None:
    """Let a W&B logger that was given no id, and has not begun a run, go on with one."""
    for logger in trainer.loggers:
        if not isinstance(logger, WandbLogger) or "WANDB_RUN_ID" in os.environ:
            continue
        if logger._experiment is None and logger._wandb_init.get("id") is None:
            logger._wandb_init["id"] = logger._id = run_id
