"""Names of AsyncCheckpoint's files: what a ``filename`` may be, and what a name lacks."""

import os
import re
from collections.abc import Callable, Mapping
from functools import partial

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_align.callbacks.checkpoint_checks import check
from lightning_align.checkpointing.manifest import DATA

_MAX_BYTES = 200  # filesystems take 255, and a version and the manifest's suffix follow the name


class _Anything(dict[str, Tensor]):
    """Metrics that hold whatever is asked for, and note what that was.

    Lightning turns what is logged into floats; only epoch and step are integers.
    """

    def __init__(self) -> None:
        super().__init__(epoch=torch.tensor(0), step=torch.tensor(0))
        self.asked: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Tensor:
        self.asked.add(name)
        return torch.tensor(0.5)


def check_constants(callback: ModelCheckpoint) -> None:
    """Refuse what ModelCheckpoint calls files by, where AsyncCheckpoint would not follow.

    Raises:
        ValueError: If a subclass or an instance has set one of its constants.
    """
    rule = f"must be {DATA!r}, by which checkpoints are found"
    check("FILE_EXTENSION", callback.FILE_EXTENSION, callback.FILE_EXTENSION == DATA, rule)
    rule = "must stay as it is: the newest checkpoint keeps its own name"
    way_out = "ckpt_path='last' and last_model_path tell which it is"
    name = callback.CHECKPOINT_NAME_LAST
    stays = name == ModelCheckpoint.CHECKPOINT_NAME_LAST
    check("CHECKPOINT_NAME_LAST", name, stays, rule, way_out)


def check_names(callback: ModelCheckpoint) -> set[str]:
    """Refuse names that no checkpoint could have; returns the metrics that stand in the filename.

    Raises:
        ValueError: If the filename or a constant of the callback is such.
    """
    check_constants(callback)
    if callback.filename is None:
        return set()
    return check_filename(callback.filename, partial(formatted_name, callback))


def check_filename(filename: str, formatted: Callable[[dict[str, Tensor]], str]) -> set[str]:
    """Refuse a filename that no checkpoint could have; returns the metrics that stand in it.

    Args:
        filename: With metrics in braces.
        formatted: Puts metrics into it, as ``format_checkpoint_name`` does.

    Raises:
        ValueError: If its braces cannot be filled, or what comes out is no name of a file.
    """

    def must(holds: bool, rule: str, way_out: str) -> None:
        check("filename", filename, holds, rule, way_out)

    must(isinstance(filename, str), "must be a text", "Write it as '{epoch}-{step}'")
    must(bool(filename.strip()), "must not be empty", "Leave it out for '{epoch}-{step}'")
    text = re.sub(r"\{.*?\}", "", filename)
    rule = "must be a file name, without folders"
    must("/" not in text and "\\" not in text, rule, "The folder is dirpath")
    metrics = _Anything()
    try:
        name = formatted(metrics)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        rule = f"cannot be filled with numbers ({error})"
        way_out = (
            "Write metrics as {val_loss:.2f}; the integers {epoch:03d} and {step:06d} take d, too"
        )
        must(False, rule, way_out)
    must(DATA not in name, f"must not hold {DATA!r}, which is added", "Leave it out")
    must(not name.startswith("."), "must not begin with a dot", "Begin with a letter")
    rule = "must be printable, and without '::', where a URL ends"
    must(name.isprintable() and "::" not in name, rule, "Use letters, digits, '-', '_' and '='")
    rule = f"must fit into {_MAX_BYTES} bytes"
    must(len(name.encode()) <= _MAX_BYTES, rule, "Name fewer metrics")
    return metrics.asked


def formatted_name(
    callback: ModelCheckpoint, metrics: dict[str, Tensor], version: int | None = None
) -> str:
    """Name of a checkpoint, as the filename of a callback has it.

    Args:
        callback: Has the filename.
        metrics: What was logged.
        version: Number behind the name, if it has one.
    """
    path = callback.format_checkpoint_name(metrics, ver=version)
    folder = os.path.join(str(callback.dirpath), "") if callback.dirpath else ""
    return file_name(path[len(folder) :])


def file_name(formatted: str) -> str:
    """Name of a checkpoint, from what ModelCheckpoint makes of the filename.

    Args:
        formatted: With extension; the slash of a metric such as ``val/loss`` makes no folder.
    """
    return formatted.removesuffix(DATA).replace("/", "_")


def warn_of_unlogged(filename: str, fields: set[str], metrics: Mapping[str, Tensor]) -> set[str]:
    """Tell which metrics of a filename stand as 0 in it because nobody logged them; returns those.

    Args:
        filename: With metrics in braces.
        fields: The metrics that stand in it, less those that were told of before.
        metrics: What was logged.
    """
    unlogged = fields - metrics.keys()
    if unlogged:
        rank_zero_warn(
            f"AsyncCheckpoint(filename={filename!r}): {', '.join(sorted(unlogged))} was not logged"
            f" and stands as 0 in the name. These values were: {sorted(metrics)}."
        )
    return unlogged
