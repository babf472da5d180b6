"""A commit after every optimizer step, as soon as nothing would be lost with it.

What belongs to a step beside tensors (loops, callbacks, schedulers, the position in the data) is
what Lightning puts into a checkpoint; it goes into the commit record, so that both are of one step.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_align._compat import lightning_resume
from lightning_align._compat.lightning_trainer import is_accumulating
from lightning_align.offload.record import read_record
from lightning_align.run.accumulation import is_safe_point


class CommitSteps(pl.Callback):
    """Commits what ``ZeROInfinityStrategy`` has written; the strategy brings it."""

    _committed = -1

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._committed = trainer.global_step

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._commit(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_fit = trainer.state.fn == TrainerFn.FITTING  # validate() alone changes nothing
        if is_fit and not trainer.sanity_checking:
            self._commit(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._commit(trainer)

    def _commit(self, trainer: pl.Trainer) -> None:
        strategy: Any = trainer.strategy
        step = trainer.global_step
        if step == self._committed or is_accumulating(trainer) or not is_safe_point(trainer):
            return
        dump = lightning_resume.dump_checkpoint
        strategy.commit(trainer, lambda: dump(trainer, weights_only=False))
        self._committed = step


class Payload:
    """What belongs to a step beside the tensors of blocks.

    The optimizer's counters are of updates that may still be to come, and are added behind them.

    Args:
        checkpoint: What Lightning puts into one; it is written down at once.
    """

    def __init__(self, checkpoint: dict[str, Any]) -> None:
        first, *others = checkpoint["optimizer_states"]
        states = [{**first, "state": {}}, *others]
        self._rest = _written({**checkpoint, "optimizer_states": states})

    def with_state(self, state: dict[Any, Any]) -> bytes:
        """All of it, as bytes.

        Args:
            state: The optimizer's, without what blocks have of it.
        """
        return len(self._rest).to_bytes(8, "little") + self._rest + _written(state)


def _written(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load_payload(folder: Path, *, weights_only: bool) -> dict[str, Any]:
    """What belongs to the committed step of a folder, as Lightning reads a checkpoint.

    Args:
        folder: Of the store.
        weights_only: Whether it may hold plain data only.

    Raises:
        ValueError: If there is none, or its record is damaged.
    """
    record = read_record(folder)
    if record is None:
        raise ValueError(f"No step is committed in {folder}.")
    end = 8 + int.from_bytes(record.payload[:8], "little")
    rest, state = (
        torch.load(io.BytesIO(part), map_location="cpu", weights_only=weights_only)
        for part in (record.payload[8:end], record.payload[end:])
    )
    checkpoint: dict[str, Any] = rest
    checkpoint["optimizer_states"][0]["state"] = state
    return checkpoint
