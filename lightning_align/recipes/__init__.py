"""Tested configurations to begin with: listed, printed, copied.

The first line of each file says what it does; it is the line of the list. Recipes of hub models
say below it what they need with which layers over them: these are the rows of a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from lightning_align._errors import argument_error
from lightning_align.cli.commands import CommandParser
from lightning_align.cli.mistakes import did_you_mean


def names() -> list[str]:
    """Names of all recipes, in the order of the alphabet."""
    contents = files(__name__).iterdir()
    return sorted(c.name.removesuffix(".yaml") for c in contents if c.name.endswith(".yaml"))


def text(name: str) -> str:
    """A recipe as YAML.

    Raises:
        ValueError: If there is none of the name.
    """
    name = name.removesuffix(".yaml")
    if name not in names():
        rule = "there is no such recipe"
        way_out = did_you_mean(name, names()).strip().rstrip("?.")
        way_out = f"{way_out}? There are" if way_out else "There are"
        raise argument_error("recipes", "name", name, rule, f"{way_out}: {', '.join(names())}")
    return files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Need:
    """What a model of a size needs on each device.

    Attributes:
        size: Of the model, such as ``"3 B"``.
        technique: Optimizer, or what trains a part at a time.
        devices: Number and name, as ``lightning-align plan`` has them.
        memory: Of each device.
        host: Memory of the host, where states are there.
        layers: Options of ``fit``.
    """

    size: str
    technique: str
    devices: str
    memory: str
    host: str
    layers: str


_NEED = re.compile(
    r"#   (?P<size>\S+ B), (?P<technique>\w+), (?P<devices>\d+ x [\w-]+)"
    r"(?:, host (?P<host>[\d.]+ \w+))?: (?P<memory>[\d.]+ \w+): (?P<layers>-c .+)"
)


def needs(name: str) -> list[Need]:
    """What the head of a recipe says of sizes, techniques and memory; nothing for most.

    Raises:
        ValueError: If there is none of the name.
    """
    found = map(_NEED.fullmatch, text(name).splitlines())
    return [
        Need(**{key: value or "" for key, value in each.groupdict().items()})
        for each in found
        if each
    ]


def copy(name: str, file: str | Path | None = None) -> Path:
    """Copy a recipe to ``file``, by default ``<name>.yaml`` in the working folder.

    Raises:
        ValueError: If there is none of the name, or the file exists.
    """
    content = text(name)
    path = Path(file) if file is not None else Path(f"{name.removesuffix('.yaml')}.yaml")
    if path.is_dir():
        path = path / f"{name.removesuffix('.yaml')}.yaml"
    if path.exists():
        raise argument_error("recipes", "file", str(path), "exists already", "Give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def listed() -> Iterator[str]:
    """A line for each recipe, and the table of those that say what they need."""
    for name in names():
        yield f"{name:17} {text(name).splitlines()[0].removeprefix('# ')}"
    rows = [["size", "technique", "devices", "memory of each", "host", "lightning-align fit"]]
    for name in names():
        for each in needs(name):
            own = (each.size, each.technique, each.devices, each.memory, each.host, each.layers)
            rows.append(list(own))
    from lightning_align.cli.plan_report import columns  # seconds, for torch

    yield from ["", *columns(rows)]


def parser() -> CommandParser:
    """Options of ``lightning-align recipes``."""
    about = "Tested configurations to begin with. Without arguments: list them."
    parser = CommandParser("lightning-align recipes", about)
    help_words = "NAME prints a recipe; copy NAME [FILE] copies it, by default to NAME.yaml."
    parser.add_argument("words", nargs="*", help=help_words)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-align recipes``.

    Raises:
        ValueError: If there is no such recipe, or too many words.
    """
    words = parser().parse_args(list(arguments)).words or []
    if words[:1] == ["copy"] and len(words) in (2, 3):
        print(copy(*words[1:]))  # noqa: T201
    elif len(words) == 1 and words != ["copy"]:
        print(text(words[0]), end="")  # noqa: T201
    elif not words:
        print("\n".join(listed()))  # noqa: T201
    else:
        rule = "must be nothing, NAME, or copy NAME [FILE]"
        raise argument_error("recipes", "words", " ".join(words), rule)
