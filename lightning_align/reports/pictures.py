"""Pictures go where the run's scalars go: one matplotlib figure to every logger that takes images.

Lightning has no word for "log a picture": each logger has its own, and many have none. A logger
takes images if it has W&B's ``log_image(key, images, step)``, or if its ``experiment`` has
TensorBoard's ``add_image(tag, image, step, dataformats)``; asking for the method instead of the
class serves loggers we have never seen and imports none. Where no logger takes images, the picture
is a PNG in the run's folder. matplotlib (extra ``plot``) loads on first use, and only
its object-oriented half with the Agg canvas: no display, no state shared with the user's pyplot.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import numpy as np
from fsspec.core import url_to_fs
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from lightning_align._compat import lightning_logged
from lightning_align.reports.texts import send

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# trainer -> wanted path -> the one that it has got; a run may write its picture again and again.
_written: WeakKeyDictionary[pl.Trainer, dict[str, str]] = WeakKeyDictionary()


def log_figure(
    trainer: pl.Trainer, key: str, figure: Figure, *, filename: str | None = None
) -> list[str]:
    """Send a figure to every logger that takes images; returns where it went, in words.

    Call it on every rank: only rank zero draws and writes. A picture is never worth a run, so a
    folder that cannot be written is a warning.

    Args:
        trainer: Its loggers, global step and folder are used.
        key: Name of the picture in the loggers, for instance ``"curves"``.
        figure: A matplotlib figure; it is not changed.
        filename: PNG to write in the folder of the run besides; by default ``<key>.png``, and only
            if no logger takes images. That of an earlier run stays: see ``free_path``.
    """
    if not trainer.is_global_zero:
        return []
    png, image_HWC = draw(figure)
    places = send_image(trainer, key, image_HWC)
    if filename is None and not places:
        filename = f"{key.replace('/', '_')}.png"
    if filename is not None:
        wanted = os.path.join(run_folder(trainer), filename)
        paths = _written.setdefault(trainer, {})
        try:
            paths[wanted] = paths.get(wanted) or free_path(wanted)
            write_file(paths[wanted], png)
            places.append(paths[wanted])
        except OSError as error:
            rank_zero_warn(f"The picture {key!r} was not written to {wanted}: {error}")
    return places


def run_folder(trainer: pl.Trainer) -> str:
    """Where the files of a run go: beside those of its first logger that keeps any.

    It is the folder in which ``ModelCheckpoint`` makes its ``checkpoints``, and without such a
    logger ``trainer.default_root_dir``. On rank zero only: loggers have no version elsewhere.
    """
    for logger in trainer.loggers:
        folder = logger.save_dir
        if isinstance(folder, (str, os.PathLike)):
            version = logger.version
            version = version if isinstance(version, str) else f"version_{version}"
            return os.path.join(folder, str(logger.name or ""), version)
    return str(trainer.default_root_dir)


def free_path(path: str) -> str:
    """The path, or where that is a file ``name-v1.png`` and so on, as ModelCheckpoint counts."""
    stem, ending = os.path.splitext(path)
    filesystem, _ = url_to_fs(path)
    found, version = path, 0
    while filesystem.isfile(url_to_fs(found)[1]):
        version += 1
        found = f"{stem}-v{version}{ending}"
    return found


def send_image(trainer: pl.Trainer, key: str, image_HWC: NDArray[np.uint8]) -> list[str]:
    """Send a picture to every logger that takes images; returns where it went, in words."""
    step = lightning_logged.line_number(trainer)
    ways: dict[str, Callable[[Any], object]] = {
        "log_image": lambda log: log(key=key, images=[image_HWC], step=step),
        "add_image": lambda add: add(key, image_HWC, step, dataformats="HWC"),
    }
    return send(trainer, key, ways)


def write_file(path: str, content: bytes) -> None:
    """Write a file at any fsspec URL, and the folders above it.

    Raises:
        OSError: If it cannot be written.
    """
    filesystem, inner_path = url_to_fs(path)
    filesystem.makedirs(os.path.dirname(inner_path), exist_ok=True)
    with filesystem.open(inner_path, "wb") as file:
        file.write(content)


def draw(figure: Figure) -> tuple[bytes, NDArray[np.uint8]]:
    """The picture as a PNG file, and as (height, width, 3) bytes."""
    from PIL import Image  # matplotlib brings it

    # savefig puts the figure's own canvas back afterwards, so a pyplot figure stays usable.
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue(), np.asarray(Image.open(drawn).convert("RGB"))
