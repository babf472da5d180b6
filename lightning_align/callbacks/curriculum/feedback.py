"""Losses of optimizer steps, handed to the self-paced schedulers of a run.

Every rank must decide alike, and a resumed run as the one that was never stopped: a loss is reduced
over ranks before anybody keeps it, so that what waits for the end of an open window is the same on
all of them, and plain data.
"""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_align._compat.lightning_resume import train_loaders
from lightning_align._compat.lightning_trainer import is_accumulating
from lightning_align.callbacks.spikes.measures import WindowLosses
from lightning_align.data.feedback import SelfPaced, check_lag
from lightning_align.run.protocols import MeasuresSteps
from lightning_align.run.skipping import stream_position


class Feedback:
    """What self-paced schedulers are told of a run.

    Args:
        schedulers: They, by the part of the curriculum that each paces.
    """

    def __init__(self, schedulers: Mapping[str, SelfPaced]) -> None:
        self.schedulers = dict(schedulers)
        self._losses = WindowLosses()

    def reset(self) -> None:
        """Forget all decisions and losses, for a new run."""
        for scheduler in self.schedulers.values():
            scheduler.load_state_dict(scheduler.undecided().state_dict())
        self._losses = WindowLosses()

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at module and loaders, in ``on_train_start``.

        Raises:
            ValueError: If a lag is shorter than what the loaders draw ahead of training.
        """
        if not self.schedulers:
            return
        self._losses.begin(pl_module)
        loaders = train_loaders(trainer)
        for loader in loaders.flattened if loaders is not None else ():
            workers = getattr(loader, "num_workers", 0)
            for scheduler in self.schedulers.values():
                check_lag(scheduler.lag, workers, getattr(loader, "prefetch_factor", None))
        for scheduler in self.schedulers.values():
            scheduler.observe(stream_position(trainer))

    def add(self, trainer: pl.Trainer, loss: Tensor) -> None:
        """Take a loss that is about to be propagated back; collective, unless the module tells."""
        if self._losses.told or not self.schedulers:
            return
        own = self._losses.add(trainer, loss)
        self._losses.losses[-1] = trainer.strategy.reduce(own, reduce_op="mean")

    def end_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let schedulers take note of a trained batch, and tell of what they decide.

        To be called in ``on_train_batch_end`` before anybody saves. Waits for the device where a
        step was taken.
        """
        if not self.schedulers:
            return
        loss = None if is_accumulating(trainer) else self._close(pl_module)
        position = stream_position(trainer)
        for part, scheduler in self.schedulers.items():
            decision = scheduler.observe(position, loss)
            if decision is not None:
                rank_zero_info(
                    f"Curriculum: the loss of {part} {scheduler.levels[decision.level - 1]} has"
                    f" flattened; {scheduler.levels[decision.level]} from batch"
                    f" {decision.batch} on."
                )

    def _close(self, pl_module: pl.LightningModule) -> float | None:
        """Mean loss of the step that was taken; None if there was none."""
        losses, self._losses.losses = self._losses.losses, []
        if self._losses.told:
            assert isinstance(pl_module, MeasuresSteps)
            measured = pl_module.measured_step
            return None if measured is None else float(measured[0])
        return math.fsum(map(float, losses)) / len(losses) if losses else None

    def state_dict(self) -> dict[str, Any]:
        """Decisions, losses that wait for more, and those of an open window, as plain JSON."""
        states = {part: each.state_dict() for part, each in self.schedulers.items()}
        return {"schedulers": states, "window": self._losses.plain()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave.

        Raises:
            ValueError: If another rule has decided.
        """
        for part, each in self.schedulers.items():
            each.load_state_dict(state["schedulers"][part])
        self._losses.restore(state["window"])


def self_paced(parts: Mapping[str, Any]) -> dict[str, SelfPaced]:
    """Those of a curriculum's schedulers that are paced by losses, by part."""
    return {part: each for part, each in parts.items() if isinstance(each, SelfPaced)}
