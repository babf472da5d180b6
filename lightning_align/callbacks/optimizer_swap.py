"""Another optimizer for a LightningModule that is not ours, without touching its code."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer, lr_scheduler
from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import argument_error
from lightning_align.optimizers import param_groups
from lightning_align.optimizers.by_name import built_optimizer, optimizer_builder, scheduler_builder
from lightning_align.run import found_rate
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.protocols import keeps_shapes

# Schedulers that multiply the learning rate of each group and keep their arguments under the names
# of their constructor. Others hold numbers for the old groups, or wait for a metric.
_REBUILT = (
    lr_scheduler.ConstantLR,
    lr_scheduler.CosineAnnealingLR,
    lr_scheduler.CosineAnnealingWarmRestarts,
    lr_scheduler.ExponentialLR,
    lr_scheduler.LambdaLR,
    lr_scheduler.LinearLR,
    lr_scheduler.MultiStepLR,
    lr_scheduler.PolynomialLR,
    lr_scheduler.SequentialLR,
    lr_scheduler.StepLR,
)


@declared
class OptimizerSwap(pl.Callback):
    """Train any LightningModule with another optimizer, which gets named parameter groups.

    A module hands its optimizer ``self.parameters()``, in which hidden matrices look like
    embeddings. This callback takes the place of ``configure_optimizers`` during ``fit``: it sorts
    the parameters with ``build_param_groups``, prints the table, and builds the optimizer. The
    module's own learning rate scheduler is built anew on it, with the same arguments.

    Args:
        optimizer: Builds the optimizer from named parameter groups, or its name.
        lr_scheduler: Builds a scheduler that steps after every optimizer step, in place of the
            module's own.
        adamw_patterns: Names of parameters that are no hidden matrices, with ``*`` and ``?``.
        matrix_patterns: Names of parameters that are hidden matrices.
        layers_attribute: Dotted name of the list of blocks, from the language model or from the
            LightningModule, if it is not found.

    Raises:
        ValueError: Before training, if a pattern matches nothing, if the module has several
            optimizers, if its scheduler cannot be built anew, if the Trainer has another
            OptimizerSwap, if ``lr_find`` meets several learning rates, or under FSDP1 and
            DeepSpeed.

    Example:
        >>> callback = OptimizerSwap(partial(Muon, lr=0.02, adamw_lr=3e-3))

    Note: ``module.lr`` is not read, but for what ``Tuner.lr_find`` has set it to. A run cannot
    change its optimizer when it is resumed; start it from the weights. Not with FSDP1 and
    DeepSpeed, which flatten the parameters.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        adamw_patterns: Sequence[str] = (),
        matrix_patterns: Sequence[str] = (),
        layers_attribute: str | None = None,
    ) -> None:
        self.optimizer = optimizer_builder("OptimizerSwap", optimizer)
        self.lr_scheduler = scheduler_builder("OptimizerSwap", lr_scheduler)
        self._sought: tuple[str, ...] = ()  # attributes of the module that lr_find may set
        self._before: float | None = None  # what they were before it did
        self._found: float | None = None
        self._is_sought = False  # whether it is at it
        self.grouping: dict[str, Any] = {
            "adamw_patterns": adamw_patterns,
            "matrix_patterns": matrix_patterns,
            "layers_attribute": layers_attribute,
        }

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the place of the module's ``configure_optimizers``.

        Raises:
            ValueError: If the strategy hands the optimizer pieces of flattened parameters, or there
                is another OptimizerSwap.
        """
        number = sum(isinstance(callback, OptimizerSwap) for callback in callbacks_of(trainer))
        if number > 1:
            rule = f"the Trainer has {number}, and a run has one optimizer"
            raise argument_error("OptimizerSwap", "optimizer", "...", rule, "Keep one of them")
        if not keeps_shapes(trainer.strategy):
            rule = (
                f"{type(trainer.strategy).__name__} flattens parameters, so that no matrix can be"
                " told from the rest"
            )
            way_out = "Take strategy='ddp', or ModelParallelStrategy with fully_shard"
            raise argument_error("OptimizerSwap", "optimizer", "...", rule, way_out)
        if stage == "fit":
            # An attribute of the instance: the class, and so every other module of it, stays.
            theirs = pl_module.configure_optimizers
            self._notice_rate(trainer, pl_module)
            vars(pl_module)["configure_optimizers"] = partial(self._configure, pl_module, theirs)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            vars(pl_module).pop("configure_optimizers", None)

    def _notice_rate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take down what the module's rate is before ``lr_find`` changes it, and what it is now."""
        names = found_rate.attributes_sought(trainer)
        if names and names != self._sought:  # a second search begins with what the first has found
            self._sought, self._before = names, found_rate.rate_of(pl_module, names)
        self._is_sought, self._found = bool(names), None
        if (rate := found_rate.rate_of(pl_module, self._sought)) != self._before:
            self._found = rate

    def _configure(self, pl_module: pl.LightningModule, theirs: Callable[[], Any]) -> Any:
        """What Lightning calls instead of the module's ``configure_optimizers``."""
        schedules = self._schedules(type(pl_module).__name__, theirs())
        groups = param_groups.build_param_groups(pl_module, **self.grouping)
        rank_zero_info(f"OptimizerSwap:\n{groups}")
        optimizer = built_optimizer("OptimizerSwap", self.optimizer, groups)
        if self._is_sought:
            found_rate.refuse_several("OptimizerSwap", optimizer)
        if self._found is not None:
            rank_zero_info(f"OptimizerSwap: lr={self._found:g}, as lr_find has set it.")
            found_rate.set_rate(optimizer, self._found)
        rates = param_groups.learning_rates(optimizer)
        if self.lr_scheduler is not None:
            schedules = [{"scheduler": self.lr_scheduler(optimizer), "interval": "step"}]
        else:
            schedules = [
                {**schedule, "scheduler": self._rebuilt(schedule["scheduler"], optimizer)}
                for schedule in schedules
            ]
        for schedule in schedules:
            param_groups.warn_of_lost_ratios(rates, optimizer, schedule["scheduler"])
        return [optimizer], schedules

    def _schedules(self, name: str, configured: Any) -> list[dict[str, Any]]:
        """The schedulers in what a module's ``configure_optimizers`` returned.

        Raises:
            ValueError: If there are several optimizers.
        """
        optimizers, schedules = _parts(configured)
        if len(optimizers) > 1:
            rule = f"{name}.configure_optimizers returns {len(optimizers)} and must return one"
            way_out = "Change the module's own optimizers"
            raise argument_error("OptimizerSwap", "optimizer", "...", rule, way_out)
        return [s if isinstance(s, dict) else {"scheduler": s} for s in schedules]

    def _rebuilt(self, theirs: Any, optimizer: Optimizer) -> Any:
        """A scheduler of the same class and arguments, at its beginning.

        Raises:
            ValueError: If that cannot be done without guessing.
        """
        functions = getattr(theirs, "lr_lambdas", [])
        if type(theirs) not in _REBUILT or any(f is not functions[0] for f in functions):
            rule = (
                f"the module's {type(theirs).__name__} was made for its own optimizer and cannot be"
                " built anew"
            )
            way_out = "Pass the scheduler to OptimizerSwap"
            raise argument_error("OptimizerSwap", "lr_scheduler", None, rule, way_out)
        if isinstance(theirs, lr_scheduler.SequentialLR):
            parts = [self._rebuilt(part, optimizer) for part in theirs._schedulers]
            return lr_scheduler.SequentialLR(optimizer, parts, theirs._milestones)
        arguments = vars(theirs) | ({"lr_lambda": functions[0]} if functions else {})
        if isinstance(theirs, lr_scheduler.MultiStepLR):
            arguments["milestones"] = sorted(theirs.milestones.elements())
        names = set(inspect.signature(type(theirs)).parameters) - {"optimizer", "last_epoch"}
        return type(theirs)(optimizer, **{name: arguments[name] for name in names})


def _parts(configured: Any) -> tuple[list[Any], list[Any]]:
    """(optimizers, schedulers) in any of the forms that Lightning allows."""
    if configured is None:
        return [], []
    if isinstance(configured, dict):
        schedule = configured.get("lr_scheduler")
        return [configured["optimizer"]], [] if schedule is None else [schedule]
    if not isinstance(configured, (list, tuple)):
        return [configured], []
    if len(configured) == 2 and isinstance(configured[0], (list, tuple)):
        optimizers, schedules = configured
        return list(optimizers), list(schedules) if isinstance(schedules, list) else [schedules]
    pairs = [_parts(one) for one in configured]
    return [o for pair in pairs for o in pair[0]], [s for pair in pairs for s in pair[1]]
