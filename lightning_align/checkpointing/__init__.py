"""Checkpoints that cost a memory copy: snapshots, their files, and finding the newest whole one."""

from lightning_align.checkpointing.engine import Commit, SaveError, SaveResult, SnapshotEngine
from lightning_align.checkpointing.manifest import (
    Manifest,
    committed_checkpoints,
    latest_valid_checkpoint,
    load_checkpoint,
)

__all__ = [
    "Commit",
    "Manifest",
    "SaveError",
    "SaveResult",
    "SnapshotEngine",
    "committed_checkpoints",
    "latest_valid_checkpoint",
    "load_checkpoint",
]
