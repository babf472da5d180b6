"""Checkpoints that cost a memory copy: snapshots, their files, and finding the newest whole one."""

from lightning_align.checkpointing.engine import SnapshotEngine
from lightning_align.checkpointing.latest import (
    committed_checkpoints,
    latest_valid_checkpoint,
    load_checkpoint,
)
from lightning_align.checkpointing.manifest import Manifest
from lightning_align.checkpointing.results import Commit, SaveError, SaveResult

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
