"""What AsyncCheckpoint refuses: arguments out of range, strategies whose state it cannot copy."""

from datetime import timedelta

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from lightning_align._errors import argument_error


def check(argument: str, value: object, holds: bool, rule: str, way_out: str = "") -> None:
    """Refuse the value of an argument unless something ``holds``.

    Raises:
        ValueError: If it does not.
    """
    if not holds:
        raise argument_error("AsyncCheckpoint", argument, value, rule, way_out)


def check_triggers(
    every_n_train_steps: int | None,
    train_time_interval: timedelta | None,
    every_n_epochs: int | None,
) -> None:
    """Refuse negative triggers, and two at once.

    Raises:
        ValueError: If there are such.
    """
    given = {
        "every_n_train_steps": every_n_train_steps,
        "train_time_interval": train_time_interval,
        "every_n_epochs": every_n_epochs,
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        least = timedelta(0) if isinstance(value, timedelta) else 0
        check(name, value, value >= least, "must not be negative")  # type: ignore[operator]
    asked = [name for name, value in given.items() if value != 0]
    if len(asked) > 1:
        raise argument_error(
            "AsyncCheckpoint",
            asked[0],
            given[asked[0]],
            f"cannot be combined with {asked[1]}",
            "Add a second AsyncCheckpoint with a dirpath of its own",
        )


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy whose state is not whole on rank 0, and other writers of checkpoints.

    Raises:
        ValueError: If it is one.
    """
    name = type(strategy).__name__
    usual = type(strategy).save_checkpoint is Strategy.save_checkpoint
    if not getattr(strategy, "saves_whole_state", usual):
        raise argument_error(
            "AsyncCheckpoint",
            "strategy",
            name,
            "its ranks save parts of the state themselves, and only a whole one on rank 0 can be"
            " copied here",
            "Use Lightning's ModelCheckpoint, or save on rank 0: with ddp, or with"
            " PipelineStrategy(save_distributed_checkpoint=False)",
        )
    if type(strategy.checkpoint_io) is not TorchCheckpointIO:
        raise argument_error(
            "AsyncCheckpoint",
            "plugins",
            type(strategy.checkpoint_io).__name__,
            "would be passed over: AsyncCheckpoint writes its files itself",
            "Take it out of plugins, or use Lightning's ModelCheckpoint",
        )
