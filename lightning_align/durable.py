"""What has to outlive a loss of power."""

from __future__ import annotations

import os


def sync_path(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable, or what is in a file.

    Args:
        path: Of the folder or file.

    Raises:
        OSError: If it is not there, or the drive refuses.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
