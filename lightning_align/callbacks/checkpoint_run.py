"""Which run a checkpoint is of: its id, its saves in all folders, and its W&B run."""

import math
import uuid
from collections.abc import Iterable
from typing import Any
from weakref import ref

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_align._compat import lightning_resume
from lightning_align.callbacks.checkpoint_folder import BATCHES, RUN, SAVES
from lightning_align.callbacks.checkpoint_place import newest_of_places
from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.manifest import DATA
from lightning_align.run.position import batches_consumed

RUN_KEY = "lightning_align.run"  # of the checkpoint


class CheckpointRun:
    """A run, which all AsyncCheckpoints of a Trainer have in common.

    Args:
        trainer: Whose run it is.
    """

    def __init__(self, trainer: pl.Trainer | None = None) -> None:
        self.id = uuid.uuid4().hex
        self.saves = 0
        self._trainer = ref(trainer) if trainer is not None else None

    def __getstate__(self) -> dict[str, Any]:
        """As of no Trainer: a copy of a callback begins a run of its own."""
        return {**vars(self), "_trainer": None}

    @property
    def is_begun(self) -> bool:
        """Whether a Trainer has it."""
        return self._trainer is not None

    def is_of(self, trainer: pl.Trainer) -> bool:
        """Whether it is the run of a Trainer; in another one another run begins.

        Args:
            trainer: The Trainer.
        """
        return self._trainer is not None and self._trainer() is trainer

    def entry(self, trainer: pl.Trainer) -> dict[str, Any]:
        """What a checkpoint holds beside the Trainer's state.

        Args:
            trainer: Whose loggers may have a W&B run.
        """
        return {"id": self.id, "wandb_run_id": lightning_resume.wandb_run_id(trainer)}

    def resume(self, entry: dict[str, Any], trainer: pl.Trainer) -> None:
        """Go on with the run of a checkpoint; another W&B run is warned of.

        Args:
            entry: What :meth:`entry` returned.
            trainer: Who resumes.
        """
        self.id = entry["id"]
        before, now = entry["wandb_run_id"], lightning_resume.wandb_run_id(trainer)
        if before and now and before != now:
            rank_zero_warn(
                f"The checkpoint is of the W&B run {before}, and this run logs to {now}. To"
                " continue that one use fit(ckpt_path='last'), or"
                f" WandbLogger(id={before!r}, resume='must')."
            )

    def metadata(
        self, trainer: pl.Trainer, monitor: str | None, score: float | None
    ) -> dict[str, Any]:
        """What the manifest of the next save says.

        Args:
            trainer: Who saves.
            monitor: Name of the value that ranks.
            score: Its value, or what ranks in its place.
        """
        self.saves += 1
        return {
            RUN: self.id,
            SAVES: self.saves,
            BATCHES: batches_consumed(trainer),
            "monitor": monitor,
            "score": score if monitor and score is not None and math.isfinite(score) else None,
            "epoch": trainer.current_epoch,
            "world_size": trainer.world_size,
            "wandb_run_id": lightning_resume.wandb_run_id(trainer),
        }


def run_of(trainer: pl.Trainer, known: Iterable[CheckpointRun]) -> CheckpointRun:
    """The run of a Trainer, or a new one.

    Args:
        trainer: The Trainer.
        known: Runs of its callbacks.
    """
    return next((run for run in known if run.is_of(trainer)), None) or CheckpointRun(trainer)


def continue_newest(
    trainer: pl.Trainer, places: Iterable[tuple[str, dict[str, Any] | None]]
) -> set[str]:
    """Path of the newest whole checkpoint in the folders of a run, whose W&B run goes on.

    Args:
        trainer: Who resumes; its loggers have not begun a run.
        places: Folders or URLs, each with the options of its filesystem.
    """
    found = newest_of_places([Folder(*place) for place in places])
    if found is None:
        return set()
    newest, folder = found
    if newest.metadata.get("wandb_run_id"):
        lightning_resume.continue_wandb_run(trainer, newest.metadata["wandb_run_id"])
    return {folder.path(newest.name + DATA)}
