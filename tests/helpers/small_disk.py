"""A disk that is soon full."""

import shutil
import subprocess

import pytest


@pytest.fixture(params=["a full file system", "a limit on file sizes"])
def small_disk(request, tmp_path):
    """A folder on which 256 KiB can be written, and a context for the process that writes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = False
    if request.param == "a full file system" and shutil.which("mount"):
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    limit = None if mounted else 256 * 1024  # where mounting is not allowed, both are this test
    yield folder, limit
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)
