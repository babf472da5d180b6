"""What is asked of callbacks."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from typing_extensions import Protocol, runtime_checkable

from lightning_align.run.callbacks import callbacks_of


@runtime_checkable
class PlansChanges(Protocol):
    """What it does to a run moves loss or gradient norm to another level, by intent."""

    def planned_change(self, position: int, /) -> str | None:
        """What changes with the batch of this number, in a few words; None for nothing."""


@runtime_checkable
class CutsBatches(Protocol):
    """It makes another batch of each that the training loader yields, before anybody has it."""

    def cut_batch(self, batch: Any, number: int, /) -> Any:
        """That batch; ``number`` is the one of the stream, and all it may depend on beside it."""


@runtime_checkable
class ForgetsWindow(Protocol):
    """It counts what is learned; a LightningModule may be asked, too."""

    def forget_window(self) -> None:
        """Called before the step of a window that will not be taken: do not count it."""


@runtime_checkable
class HasStorageOptions(Protocol):
    """It passes these options to the filesystem of its ``dirpath``."""

    @property
    def storage_options(self) -> dict[str, Any] | None:
        """Options by name, as fsspec takes them."""


@runtime_checkable
class WithdrawsCheckpoints(Protocol):
    """It takes back what it has saved of a stretch that the run has gone back behind."""

    def withdraw(self, trainer: pl.Trainer, /) -> list[str]:
        """Do so; paths of these checkpoints, on rank zero. Collective."""


# Questions


def forget_window(answers: Sequence[Any]) -> None:
    """Let nobody among module and callbacks count a window whose step will not be taken."""
    for each in answers:
        if isinstance(each, ForgetsWindow):
            each.forget_window()


def batch_cutter(trainer: pl.Trainer) -> Callable[[Any, int], Any] | None:
    """What a callback makes of each training batch, None if none does."""
    callbacks = callbacks_of(trainer)
    return next((each.cut_batch for each in callbacks if isinstance(each, CutsBatches)), None)
