"""What AsyncCheckpoint refuses: arguments out of range, shared folders, states it cannot copy."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Literal

import lightning.pytorch as pl
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info

from lightning_align._compat import lightning_resume
from lightning_align._errors import argument_error
from lightning_align.checkpointing.files import Folder
from lightning_align.run.protocols import HasStorageOptions, saves_whole_state


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
        rule = f"cannot be combined with {asked[1]}"
        way_out = "Add a second AsyncCheckpoint with a dirpath of its own"
        raise argument_error("AsyncCheckpoint", asked[0], given[asked[0]], rule, way_out)


def check_kept(
    monitor: str | None,
    mode: str,
    save_top_k: int,
    save_last: bool | Literal["link"],
    enable_version_counter: bool,
) -> None:
    """Refuse what says which checkpoints are kept, where that cannot be.

    Raises:
        ValueError: If it cannot.
    """
    check("mode", mode, mode in ("min", "max"), "must be 'min' or 'max'")
    check("save_top_k", save_top_k, save_top_k >= -1, "must be at least -1")
    rule = "without monitor there is no best to keep more than one of"
    way_out = "Set monitor, or save_top_k to -1, 0 or 1"
    check("save_top_k", save_top_k, monitor is not None or save_top_k in (-1, 0, 1), rule, way_out)
    rule = "must be True, False or 'link'; with True, too, last.ckpt is a link to the newest one"
    check("save_last", save_last, isinstance(save_last, bool) or save_last == "link", rule)
    rule = "must be True: a file that is overwritten is lost if the new one fails"
    way_out = "Leave it out; overwrite=True replaces another run once this one has saved"
    holds = bool(enable_version_counter)
    check("enable_version_counter", enable_version_counter, holds, rule, way_out)


def tell_where_no_link_is(save_last: bool | str, dirpath: str | os.PathLike[str] | None) -> None:
    """Say what to use in the place of ``last.ckpt`` where there cannot be one.

    Args:
        save_last: Whether one is wanted.
        dirpath: Folder or URL.
    """
    scheme, is_url, _ = os.fspath(dirpath or "").partition("://")
    if save_last and is_url and scheme not in ("file", "local"):
        rank_zero_info(
            f"AsyncCheckpoint(save_last={save_last}): {dirpath} has no links, so the newest"
            " checkpoint stays under its own name and there is no last.ckpt."
            " fit(ckpt_path='last') and AsyncCheckpoint.latest(dirpath) find it."
        )


def check_writing(backpressure: str, flush_timeout_s: float) -> None:
    """Refuse what says how checkpoints are written, where that cannot be.

    Raises:
        ValueError: If it cannot.
    """
    rule = "must be 'wait', 'skip' or 'latest'"
    check("backpressure", backpressure, backpressure in ("wait", "skip", "latest"), rule)
    check("flush_timeout_s", flush_timeout_s, flush_timeout_s > 0, "must be above 0")


def check_folders(callback: ModelCheckpoint, trainer: pl.Trainer) -> None:
    """Refuse two callbacks of a Trainer that write to one folder.

    Raises:
        ValueError: If another one writes where ``callback`` does.
    """
    ours = _where(callback, trainer)
    for other in trainer.checkpoint_callbacks:
        if other is not callback and isinstance(other, ModelCheckpoint):
            rule = (
                f"{callback.state_key} and {other.state_key} would both write there, and each"
                " delete what the other keeps"
            )
            way_out = "Give one of them another dirpath"
            check("dirpath", ours, _where(other, trainer) != ours, rule, way_out)


def _where(callback: ModelCheckpoint, trainer: pl.Trainer) -> str:
    dirpath = str(lightning_resume.resolve_checkpoint_dir(callback, trainer))
    options = callback.storage_options if isinstance(callback, HasStorageOptions) else None
    return Folder(dirpath, options).key


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy whose state is not whole on rank 0, and other writers of checkpoints.

    Raises:
        ValueError: If it is one.
    """
    rule = (
        "its ranks save parts of the state themselves, and only a whole one on rank 0 can be"
        " copied here"
    )
    way_out = (
        "Use Lightning's ModelCheckpoint, or save on rank 0: with ddp, or with"
        " ModelParallelStrategy or PipelineStrategy(save_distributed_checkpoint=False)"
    )
    check("strategy", type(strategy).__name__, saves_whole_state(strategy), rule, way_out)
    writer = type(strategy.checkpoint_io)
    rule = "would be passed over: AsyncCheckpoint writes its files itself"
    way_out = "Take it out of plugins, or use Lightning's ModelCheckpoint"
    check("plugins", writer.__name__, writer is TorchCheckpointIO, rule, way_out)


def on_rank_zero(trainer: pl.Trainer, action: Callable[[], None]) -> None:
    """Run what may refuse where the files are; what it raises is raised on every rank.

    Args:
        trainer: Whose ranks they are.
        action: Called on rank 0.

    Raises:
        Exception: On rank 0, what ``action`` raised.
        RuntimeError: On the other ranks, with what was raised on rank 0.
    """
    try:
        if trainer.is_global_zero:
            action()
    except Exception as error:
        trainer.strategy.broadcast(str(error))
        raise
    if message := trainer.strategy.broadcast(""):
        raise RuntimeError(f"On rank 0: {message}")
