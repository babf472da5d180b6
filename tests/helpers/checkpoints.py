"""Checkpoints as a run leaves them, without the run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


def save_checkpoint(path: Path, module: pl.LightningModule, data: Any = None) -> Path:
    """What ``ModelCheckpoint`` would write before the first step."""
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", enable_progress_bar=False, **options)
    trainer.strategy.connect(module)
    if data is not None:
        trainer.datamodule = data
        data.trainer = trainer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.save_checkpoint(path)
    return path
