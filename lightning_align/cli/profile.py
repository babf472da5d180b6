"""``lightning-align profile``: some steps of a run, measured and analysed, that leave nothing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_align._errors import argument_error, check_least
from lightning_align.cli.commands import CommandParser


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


def divided(arguments: Sequence[str], options: type = Profile) -> tuple[list[str], list[str]]:
    """Words of this command, and words of ``fit``.

    Args:
        arguments: All of them.
        options: A dataclass, whose fields are the options of this command.
    """
    own: list[str] = []
    others: list[str] = []
    names = inspect.signature(options).parameters
    words = list(arguments)
    while words:
        word = words.pop(0)
        name = word.removeprefix("--").partition("=")[0]
        is_own = word.startswith("--") and name in names
        (own if is_own else others).append(word)
        is_flag = is_own and isinstance(names[name].default, bool)
        has_value = "=" not in word and words and (not is_flag or words[0] in ("true", "false"))
        if is_own and has_value:
            own.append(words.pop(0))
    return own, others


def parser() -> CommandParser:
    """Options of ``lightning-align profile``, without those of ``fit``."""
    about = (
        "Measure and analyse some steps of what fit would train: what bounds them, and what would"
        " help. Takes all options of fit besides, such as -c run.yaml, and leaves no checkpoint or"
        " log."
    )
    return parser_of("profile", about, Profile)


def parser_of(command: str, about: str, options: type) -> CommandParser:
    """A parser of a dataclass's fields, whose docstring is the help.

    Args:
        command: Its name.
        about: What it does.
        options: The dataclass.
    """
    made = CommandParser(f"lightning-align {command}", about)
    described = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(options) or "", re.M)
    texts = {name: " ".join(text.split()) for name, text in described}
    for name, parameter in inspect.signature(options).parameters.items():
        kind = str if parameter.default is None else type(parameter.default)
        given: dict[str, Any] = {"type": kind, "default": parameter.default}
        if kind is bool:
            given |= {"nargs": "?", "const": True}
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
    from lightning_align.cli.traceless import scratch_folder

    with scratch_folder("profile") as folder:
        ProfileCLI(["fit", *others], profile, folder)
