"""``lightning-align profile``: some steps of a run, measured and analysed, that leave nothing."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_align._errors import argument_error, check_least
from lightning_align.cli.commands import CommandParser

FOLDER = "LIGHTNING_ALIGN_PROFILE_FOLDER"  # told to the processes that a strategy starts


@dataclass(frozen=True)
class Profile:
    """What is asked for.

    Args:
        steps: Optimizer steps whose time is taken; before them one warms up and one is analysed.
        meta: Whether to build the model without weights and read no data; nothing is timed.
        hardware: Name of a maker's sheet, such as h100-sxm; by default what is at hand.
        top_k: Modules of the table and operations of the picture.
        json_file: File to write all figures to.
        png: Picture of the roofline to write (extra: plot).
        trace: Chrome trace of the operations to write, as predicted, for ui.perfetto.dev.

    Raises:
        ValueError: If a number is below 1, or a file would lie in a folder that is not there.
    """

    steps: int = 5
    meta: bool = False
    hardware: str | None = None
    top_k: int = 20
    json_file: str | None = None
    png: str | None = None
    trace: str | None = None

    def __post_init__(self) -> None:
        check_least("profile", 1, steps=self.steps, top_k=self.top_k)
        for argument in ("json_file", "png", "trace"):
            path = getattr(self, argument)
            if path is not None and not Path(path).absolute().parent.is_dir():
                rule = "cannot be written: its folder is not there"
                raise argument_error("profile", argument, path, rule)


def divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of this command, and words of ``fit``.

    Args:
        arguments: All of them.
    """
    own: list[str] = []
    others: list[str] = []
    names = inspect.signature(Profile).parameters
    words = list(arguments)
    while words:
        word = words.pop(0)
        name = word.removeprefix("--").partition("=")[0]
        is_own = word.startswith("--") and name in names
        (own if is_own else others).append(word)
        if (
            is_own
            and "=" not in word
            and words
            and (name != "meta" or words[0] in ("true", "false"))
        ):
            own.append(words.pop(0))
    return own, others


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder for what a run writes, beside the user's files, so on the same drive.

    Raises:
        ValueError: If it cannot be made.
    """
    shared = os.environ.get(FOLDER)
    if shared is not None:  # in a process that a strategy has started
        yield shared
        return
    try:
        folder = tempfile.mkdtemp(prefix=".profile-", dir=".")
    except OSError as error:
        rule = f"nothing can be written to the working folder: {error}"
        raise argument_error("profile", "folder", os.getcwd(), rule) from error
    os.environ[FOLDER] = os.path.abspath(folder)
    try:
        yield os.path.abspath(folder)
    finally:
        del os.environ[FOLDER]
        shutil.rmtree(folder, ignore_errors=True)


def parser() -> CommandParser:
    """Options of ``lightning-align profile``, without those of ``fit``."""
    about = (
        "Measure and analyse some steps of what fit would train: what bounds them, and what would"
        " help. Takes all options of fit besides, such as -c run.yaml, and leaves no checkpoint or"
        " log."
    )
    made = CommandParser("lightning-align profile", about)
    described = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(Profile) or "", re.M)
    texts = {name: " ".join(text.split()) for name, text in described}
    types: dict[str, Any] = {"steps": int, "top_k": int, "meta": bool}
    for name, parameter in inspect.signature(Profile).parameters.items():
        given: dict[str, Any] = {"type": types.get(name, str), "default": parameter.default}
        if name == "meta":
            given["nargs"] = "?"
            given["const"] = True
        made.add_argument(f"--{name}", **given, help=texts[name])
    return made


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-align profile``.

    Raises:
        ValueError: If a value is out of its range, or a file cannot be written.
    """
    own, others = divided(arguments)
    if {"-h", "--help"} & set(others):
        own, others = ["--help"], []
    profile = Profile(**parser().parse_args(own).as_dict())
    from lightning_align.cli.profile_run import ProfileCLI  # seconds, for Lightning

    with scratch_folder() as folder:
        ProfileCLI(["fit", *others], profile, folder)
