"""A run of the command line that leaves no checkpoint, no log, and the user's files as they are."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override

from lightning_align._errors import argument_error
from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.lock import LOCK_FILE, FolderLock
from lightning_align.cli.app import Program

FOLDER = "LIGHTNING_ALIGN_{}_FOLDER"  # told to the processes that a strategy starts


@contextmanager
def scratch_folder(command: str) -> Iterator[str]:
    """A folder for what a run writes, beside the user's files, so on the same drive.

    Args:
        command: Whose run it is.

    Raises:
        ValueError: If it cannot be made.
    """
    variable = FOLDER.format(command.upper())
    shared = os.environ.get(variable)
    if shared is not None:  # in a process that a strategy has started
        yield shared
        return
    try:
        folder = tempfile.mkdtemp(prefix=f".{command}-", dir=".")
    except OSError as error:
        rule = f"nothing can be written to the working folder: {error}"
        raise argument_error(command, "folder", os.getcwd(), rule) from error
    os.environ[variable] = os.path.abspath(folder)
    try:
        yield os.path.abspath(folder)
    finally:
        del os.environ[variable]
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def folders_as_they_were(folders: Iterable[str | os.PathLike[str]]) -> Iterator[None]:
    """Take folders away that were not there before, and have nothing in them but locks.

    Args:
        folders: That a set-up may make; those behind a URL are passed over.
    """
    local = [Path(each).absolute() for each in folders if "://" not in str(each)]
    made = {place for each in local for place in (each, *each.parents) if not place.exists()}
    before = {place for each in local for place in each.glob("*")}
    try:
        yield
    finally:
        # Versions in a folder that was there are made by a set-up, too.
        inside = {place for each in local for place in each.glob("*") if place.is_dir()}
        made |= inside - before
        for folder in sorted(made, key=lambda each: len(each.parts), reverse=True):
            with suppress(OSError, RuntimeError):  # it has something in it, or a run writes there
                if (folder / LOCK_FILE).exists():
                    lock = FolderLock(Folder(folder))
                    lock.acquire()
                    (folder / LOCK_FILE).unlink()
                    lock.release()
                folder.rmdir()


class Traceless(Program):
    """The command whose ``fit`` writes to a folder of its own.

    Args:
        args: Those of ``fit``.
        folder: For whatever the run writes; its end is up to the caller.
    """

    def __init__(self, args: Sequence[str], folder: str) -> None:
        self.folder = folder
        self._drives: list[str] = []
        try:
            super().__init__(args)
        finally:
            for drive in self._drives:
                shutil.rmtree(drive, ignore_errors=True)

    @override
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        options = self._options
        self.save_config_callback = None
        options.trainer.logger = False
        strategy = options.trainer.strategy
        if isinstance(strategy, Namespace) and strategy.get("init_args.nvme_path"):
            given = strategy["init_args.nvme_path"]
            folders = [given] if isinstance(given, str) else given
            fresh = [self._on_drive(each) for each in folders]
            strategy["init_args.nvme_path"] = fresh[0] if isinstance(given, str) else fresh

    def _on_drive(self, folder: str) -> str:
        """A folder on the drive of the user's one, which may hold the real run."""
        place = Path(folder).absolute()
        while not place.is_dir():
            place = place.parent
        prefix = Path(self.folder).name.partition("-")[0]
        self._drives.append(tempfile.mkdtemp(prefix=f"{prefix}-", dir=place))
        return self._drives[-1]

    def quiet(self, callbacks: Sequence[Any]) -> dict[str, Any]:
        """Arguments of a Trainer that says, validates and keeps nothing.

        Args:
            callbacks: All that it has.
        """
        return {
            "callbacks": list(callbacks),
            "logger": DummyLogger(),  # callbacks that ask for one find it
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "min_steps": None,
            "min_epochs": None,
            "fast_dev_run": False,
            "default_root_dir": self.folder,
        }

    def given_callbacks(self) -> list[Any]:
        """Those of the configuration."""
        given = self._get(self.config_init, "trainer", default={})["callbacks"] or []
        return given if isinstance(given, list) else [given]
