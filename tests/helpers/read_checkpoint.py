"""A checkpoint of any strategy, whatever its form."""

from pathlib import Path
from typing import Any

import torch

from lightning_align.offload import linked


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What is in a file, or in a folder of links."""
    if linked.is_linked(Path(path)):
        return linked.read(Path(path), "tests", weights_only=True)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found
