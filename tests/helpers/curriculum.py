"""Small curricula, and a callback that writes down which batches a run trained on."""

from typing import Any

import lightning.pytorch as pl
import torch

from lightning_align import Curriculum
from lightning_align.run.position import batches_consumed

WHOLE = 12  # predictions of a whole row of ``tests.helpers.resume.Sequences``


def linear(total: int = 6, least: int = 3, most: int = WHOLE, each: int = 3, **keys: Any) -> Any:
    """A schedule of length: 3, 6, 9, 12 predictions."""
    schedule = keys or {"total_curriculum_step": total}
    return {
        "min_difficulty": least,
        "max_difficulty": most,
        "schedule_type": "fixed_linear",
        "schedule_config": {"difficulty_step": each, **schedule},
    }


def by_length(mode: str = "truncate", scheduler: Any = None, **options: Any) -> Curriculum:
    """A curriculum of length that draws nothing and tries out nothing, unless it is asked to."""
    settings = {name: options.pop(name) for name in ("preflight", "filename") if name in options}
    length = {"mode": mode, "scheduler": scheduler or linear(), **options}
    return Curriculum(length=length, **{"preflight": False, "filename": None, **settings})


class Watch(pl.Callback):
    """What each batch looked like, in training and in validation."""

    def __init__(self) -> None:
        self.trained: dict[int, torch.Tensor] = {}  # labels by batches trained before
        self.validated: list[torch.Tensor] = []
        self.losses: dict[int, float] = {}

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.trained[batches_consumed(trainer)] = batch["labels"].clone()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses[batches_consumed(trainer)] = float(outputs["loss"])

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, *rest: Any
    ) -> None:
        self.validated.append(batch["labels"])

    @property
    def lengths(self) -> list[int]:
        return [labels.shape[1] - 1 for _, labels in sorted(self.trained.items())]
