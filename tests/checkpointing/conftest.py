from pathlib import Path

import pytest
import torch

from lightning_align.checkpointing import SnapshotEngine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 1, 2 and 3."""
    with_engine = SnapshotEngine(tmp_path)
    for step in (1, 2, 3):
        with_engine.save({"weight": torch.full((500,), float(step))}, f"step{step}", step)
    assert with_engine.close()
    return tmp_path
