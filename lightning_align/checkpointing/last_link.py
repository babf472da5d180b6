"""``last.ckpt``: a link to the newest checkpoint, for whoever wants one path that stays.

A link, since a copy would double what is written, and a kill could leave half of it. It is set
behind a commit and before anything older is deleted, so it always shows a whole checkpoint. Stores
behind a URL have no links.
"""

import os
import threading
import warnings

from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.manifest import DATA

LAST = "last"  # as ModelCheckpoint calls it
_UNFINISHED = f".{LAST}{DATA}.link"


class LastLink:
    """The link of one folder.

    Args:
        folder: Of the checkpoints.
        wanted: Whether to make it; one that is there is kept up in any case.

    Attributes:
        is_kept: Whether it is made, or kept up.
    """

    def __init__(self, folder: Folder, wanted: bool) -> None:
        self._lock = threading.Lock()  # training sets it as well as the thread that writes
        self._folder = folder
        self.is_kept = folder.is_local and (wanted or shown_by(folder, LAST) != LAST)

    def show(self, name: str) -> None:
        """Let the link show a checkpoint; what is no link of ours stays as it is.

        Args:
            name: Of the checkpoint; if it is empty, the link stays as it is.
        """
        with self._lock:
            if self.is_kept and name:
                self._show(name)

    def _show(self, name: str) -> None:
        path, unfinished = (
            os.path.join(self._folder.root, file) for file in (LAST + DATA, _UNFINISHED)
        )
        if os.path.lexists(path) and shown_by(self._folder, LAST) == LAST:
            self._give_up(path, "it is there, and no link to a checkpoint beside it")
            return
        try:
            if os.path.lexists(unfinished):  # of a run that was killed
                os.unlink(unfinished)
            os.symlink(name + DATA, unfinished)
            os.replace(unfinished, path)
        except OSError as error:
            self._give_up(path, str(error))

    def _give_up(self, path: str, why: str) -> None:
        self.is_kept = False
        warnings.warn(
            f"{path} cannot show the newest checkpoint ({why}). fit(ckpt_path='last') and"
            " AsyncCheckpoint.latest(dirpath) find it without.",
            stacklevel=3,
        )


def shown_by(folder: Folder, name: str) -> str:
    """Name of the checkpoint that a link of the folder shows; that of a file is its own.

    Args:
        folder: Of both.
        name: Of what may be a link.
    """
    path = os.path.join(folder.root, name + DATA)
    if not folder.is_local or not os.path.islink(path):
        return name
    target = os.readlink(path)
    beside = os.path.basename(target) == target and target.endswith(DATA)
    return target.removesuffix(DATA) if beside else name
