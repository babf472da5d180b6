"""Runs that were given one folder: the first writes it, later ones ``version_1`` and so on in it.

One run writes a folder, or a resume could not tell the checkpoints of two apart. A script that is
run once more writes the next version instead; whoever looks for the newest checkpoint of a folder
finds that of its newest run.
"""

import re

from lightning_align.checkpointing.files import Folder

_VERSION = re.compile(r"version_([1-9]\d*)")


def versions(folder: Folder) -> dict[int, Folder]:
    """The folder as number 0, and the versions in it, by number.

    Args:
        folder: That the runs were given.
    """
    named = filter(None, map(_VERSION.fullmatch, folder.names()))
    numbers = sorted(int(found[1]) for found in named)
    return {0: folder, **{number: version(folder, number) for number in numbers}}


def version(folder: Folder, number: int) -> Folder:
    """The folder of one run.

    Args:
        folder: That the run was given.
        number: 0 is the folder itself.
    """
    return Folder(folder.path(f"version_{number}"), folder.options) if number else folder
