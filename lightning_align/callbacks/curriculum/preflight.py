"""The longest rows of a run, once through its module before the first step."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_align.callbacks.curriculum.length import LengthPart
from lightning_align.data.batch_sizes import BatchSizes
from lightning_align.data.sequence_length import with_rows
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.preflight import no_preflight, preflight


def largest_batch(
    n: int, batch: Any, sizes: BatchSizes | None, length: LengthPart | None
) -> tuple[Any, str] | None:
    """A whole batch made as large as one of the run will be, and what that is in words.

    Args:
        n: Its number in the stream.
        batch: What a loader has yielded.
        sizes: Samples of batches on a rank, where they change.
        length: How rows are cut, if they are.

    Returns:
        None if batch n is as large.
    """

    def size_of(m: int) -> tuple[int, int]:  # 0 for what does not change
        return sizes.size(m) if sizes else 0, length.schedule.length_at(m) if length else 0

    phases = sizes.phases if sizes else []
    stretches = length.schedule.stretches() if length else []
    changes = {m for m, _ in [*phases, *stretches]}
    rows, longest = max(map(size_of, {n, *changes}), key=_tokens)
    here = size_of(n)[0], length.length_at(n) if length else 0
    if _tokens(here) >= _tokens((rows, longest)):
        return None
    words = [f"{rows} samples a rank"] if rows else []
    if length is not None:
        batch = length.cut_to(batch, longest)
        words.append(f"rows of {longest} tokens")
    return with_rows(batch, rows) if rows else batch, ", ".join(words)


def _tokens(size: tuple[int, int]) -> tuple[int, int]:
    """What a batch takes, and of two that take as much the one with longer rows."""
    rows, length = size
    return max(rows, 1) * max(length, 1), length


class Preflight(Callback):
    """Tries out one batch before the first training step of a process, and leaves.

    It is the last of all callbacks: what others freeze or set for the first batch is set.

    Args:
        largest: Returns the largest batch of the run and what it is in words; None if the first one
            is as large.
    """

    def __init__(self, largest: Callable[[], tuple[Any, str] | None]) -> None:
        self._largest = largest

    def enter(self, trainer: Trainer) -> None:
        """Be the last of the Trainer's callbacks."""
        trainer.callbacks = [*callbacks_of(trainer), self]  # type: ignore[attr-defined]

    def leave(self, trainer: Trainer) -> None:
        """Be none of them."""
        others = [each for each in callbacks_of(trainer) if each is not self]
        trainer.callbacks = others  # type: ignore[attr-defined]

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.leave(trainer)
        found = self._largest()
        if found is None:
            return
        given, words = found
        if reason := no_preflight(trainer, pl_module):
            rank_zero_info(f"Curriculum: no preflight, since {reason}.")
            return
        try:
            preflight(trainer, pl_module, given)
        except Exception as error:
            raise RuntimeError(
                f"Curriculum(preflight=True): {words}, the largest batch of the run, does not go"
                f" through {type(pl_module).__name__}: {type(error).__name__}: {error}"
            ) from error
        rank_zero_info(f"Curriculum: {words}, the largest batch of the run, went through.")
