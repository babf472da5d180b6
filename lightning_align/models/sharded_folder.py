"""Checkpoints that Lightning's ModelParallelStrategy writes: a folder with a part of each rank.

Its names begin with ``state_dict``, of which Lightning's ``consolidate_checkpoint`` knows nothing.
"""

from pathlib import Path
from typing import Any

import torch

from lightning_align._compat import torch_dcp
from lightning_align._errors import argument_error

META_FILE = "meta.pt"
MODEL = "state_dict"


def is_one(folder: Path) -> bool:
    """Whether there is such a folder that was written to its end."""
    if not (folder / META_FILE).is_file() or not (folder / torch_dcp.INDEX_FILE).is_file():
        return False
    try:
        names = torch_dcp.names(torch_dcp.read_index(folder)).values()
    except torch_dcp.UnreadableError:
        return False
    return any(levels[0] == MODEL for levels in names)


def read(folder: Path, where: str) -> dict[str, Any]:
    """The checkpoint in it without its optimizers, as from one file.

    Args:
        folder: The folder.
        where: Class or function the user called.

    Raises:
        ValueError: If its files cannot be read, or hold more than plain data.
    """
    index = torch_dcp.read_index(folder)
    keys = [key for key, levels in torch_dcp.names(index).items() if levels[0] == MODEL]
    try:
        values = torch_dcp.read(folder, index, keys)
        rest: dict[str, Any] = torch.load(folder / META_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # files that are missing, cut off, or no plain data
        rule = f"its files cannot be read as plain data ({str(error).splitlines()[0]})"
        way_out = "Copy the whole folder, or give another checkpoint"
        raise argument_error(where, "ckpt", str(folder), rule, way_out) from error
    return {**rest, **values}
