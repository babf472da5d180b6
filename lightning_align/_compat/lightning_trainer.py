"""Private APIs of Lightning's Trainer, modules and DDP."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch.callbacks import LearningRateFinder, WeightAveraging
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether gradients of the current window still wait for their optimizer step."""
    return trainer.fit_loop._should_accumulate()


def current_hook(trainer: pl.Trainer) -> str | None:
    """Name of the hook that runs now, of whatever it is."""
    return trainer.lightning_module._current_fx_name


def restart_train_iteration(trainer: pl.Trainer) -> None:
    """Start the training data loader anew, so that its sampler reads the position again."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)


def writes_one_file(strategy: ModelParallelStrategy) -> bool:
    """Whether rank 0 writes a checkpoint, of a state that all have gathered in its host memory."""
    return not strategy._save_distributed_checkpoint


def all_ranks_for_data(strategy: ModelParallelStrategy) -> None:
    """Let sizes of its mesh that are "auto" mean no tensor parallelism; before its set-up.

    Lightning's "auto" is tensor parallelism within a node: ranks with the same batches, of a module
    that says itself how its layers are divided.
    """
    if strategy._tensor_parallel_size == "auto":
        strategy._tensor_parallel_size = 1
        if strategy._data_parallel_size == "auto":
            strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


def run_steps_in(
    trainer: pl.Trainer, context: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], None]:
    """Let each training batch, from forward to optimizer step, run in a context of its own.

    Hooks before and behind the batch are outside. Returns what undoes it.
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    run = loop.run

    def within(*args: Any, **kwargs: Any) -> Any:
        with context():
            return run(*args, **kwargs)

    vars(loop)["run"] = within
    return lambda: vars(loop).pop("run", None)


def watch_fetches(
    trainer: pl.Trainer, begin: Callable[[], None], end: Callable[[], None]
) -> Callable[[], None]:
    """Call functions before and after each training batch is fetched, from the next epoch on.

    Returns what undoes it.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    before, after = loop._on_before_fetch, loop._on_after_fetch

    def fetching() -> None:
        before()
        begin()

    def fetched() -> None:
        end()
        after()

    hooks = {"_on_before_fetch": fetching, "_on_after_fetch": fetched}
    vars(loop).update(hooks)

    def undo() -> None:
        for name in hooks:
            vars(loop).pop(name, None)

    return undo


def leave_step_to_no_average(trainer: pl.Trainer) -> None:
    """Let ``WeightAveraging`` callbacks take the step to come, which moves nothing, for done."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, WeightAveraging):
            callback._latest_update_step = trainer.global_step + 1


def transferred(trainer: pl.Trainer, batch: Any) -> Any:
    """A training batch as the step gets it: converted, moved, and through the module's hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


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


def has_comm_state(strategy: Strategy) -> bool:
    """Whether a communication hook of DDP keeps a state of the parameters it was given."""
    return isinstance(strategy, DDPStrategy) and strategy._ddp_comm_state is not None


def is_compiled_whole(module: pl.LightningModule) -> bool:
    """Whether ``torch.compile(module)`` was given to the Trainer, which takes the module out."""
    return getattr(module, "_compiler_ctx", None) is not None


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


def correct_step_value(module: pl.LightningModule, name: str, value: Tensor) -> None:
    """Another value for what ``on_before_optimizer_step`` of this step has logged."""
    results, key = module.trainer._results, f"on_before_optimizer_step.{name}"
    if results is not None and key in results:
        results.update_metrics(key, value, batch_size=1)


def unscales(optimizer: Optimizer) -> bool:
    """Whether an optimizer divides gradients by the scale of the loss within its own step."""
    return bool(_optimizer_handles_unscaling(optimizer))


def rate_attribute(finder: LearningRateFinder) -> str:
    """Name of the attribute that a finder sets, where it was told one."""
    return finder._attr_name
