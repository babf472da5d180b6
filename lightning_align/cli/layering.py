"""How files and options become one configuration: layers, and what they may not inherit.

jsonargparse merges layers key by key. Within one class that is what a user wants: a second file
changes the learning rate and keeps the rest. Across classes it is a trap (the weight decay written
for AdamW goes on in SGD), and so it is in lists, whose elements are told apart by their number
only. Here another class begins from its own defaults, which is said aloud, and a list in a later
file replaces the earlier one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import jsonargparse
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lightning_align._compat.jsonargparse_parsing import (
    class_of_help,
    short_names_at_home,
    subclasses_found_once,
    whole_class_switches,
)
from lightning_align.cli.given import read_layer
from lightning_align.cli.help_text import PlainHelp, described
from lightning_align.cli.mistakes import PROGRAM, report

ConfigFile: Any = jsonargparse.ActionConfigFile  # type: ignore[attr-defined]  # in no __all__


class LayeredConfigFile(ConfigFile):  # type: ignore[misc]
    """A configuration file whose lists replace those of the layers before it."""

    def __call__(self, parser: Any, cfg: Namespace, values: Any, option_string: Any = None) -> None:
        """Apply one file to what was read so far."""
        try:
            forget_lists(_content(values), cfg)
            super().__call__(parser, cfg, values, option_string)
        except yaml.YAMLError as error:  # jsonargparse would not say in which file
            parser.error(f"{values}: must be YAML. {error}", error)
        except RecursionError as error:
            parser.error(f"{values}: must not nest lists and mappings that deep", error)


def forget_lists(layer: Mapping[str, Any], config: Namespace, above: str = "") -> None:
    """Take every list out of ``config`` for which ``layer`` brings another one."""
    for key, value in layer.items():
        path = f"{above}{key}"
        if isinstance(value, Mapping):
            forget_lists(value, config, f"{path}.")
        elif isinstance(value, list) and isinstance(config.get(path), list):
            del config[path]


def _content(values: Any) -> Mapping[str, Any]:
    """The file's mapping; empty for what is no file or no mapping: the parser knows better."""
    try:
        content = read_layer(values)
    except (OSError, ValueError, ImportError):
        return {}
    return content if isinstance(content, Mapping) else {}


class AlignParser(LightningArgumentParser):
    """The parser of a command, which answers a mistake in a line and accepts whole names only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A prefix such as --trainer.max_s would change its meaning with the next new option.
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": PlainHelp, **kwargs})
        self.commands: Any = None  # where subcommands are added, once there are some
        self._helped = class_of_help(self)
        if self._helped is not None:
            option, cls = self._helped
            self.usage = f"{option} {cls.__name__} [{option}.ARGUMENT VALUE ...]"
            self.description = described(cls)

    @override
    def format_help(self, *args: Any) -> str:
        """The help; that of a class has its description once, above its arguments."""
        if self._helped is not None:
            first = next((each for each in self._action_groups if each._group_actions), None)
            if first is not None:
                first.title = "arguments"
        text: str = super().format_help(*args)
        return text

    @override
    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Add the place for subcommands, and keep it."""
        self.commands = super().add_subcommands(*args, **kwargs)
        return self.commands

    @override
    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse with classes at home first, and whole class switches, each told once."""
        told: set[tuple[str, str]] = set()

        def notice(old: str, new: str, names: list[str]) -> None:
            if (old, new) not in told:
                told.add((old, new))
                tell_switch(old, new, names)

        def chosen(path: str, others: list[str]) -> None:
            if (path, "") not in told:
                told.add((path, ""))
                tell_choice(path, others)

        with (
            short_names_at_home(chosen),
            subclasses_found_once(),
            whole_class_switches(notice),
        ):
            return super().parse_args(*args, **kwargs)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what was wrong in one line, or jsonargparse's own words, and exit with 2."""
        if not self.exit_on_error:  # a parser inside, whose message becomes part of the outer one
            super().error(message, ex)
        report(message, ex, self, self.commands.choices if self.commands else {})
        self.exit(2)


@rank_zero_only
def tell_choice(path: str, others: list[str]) -> None:
    """Say on standard error whose class a short name is taken for."""
    name, other = path.rpartition(".")[2], " or ".join(others)
    sys.stderr.write(f"{PROGRAM}: {name} is {path}; for {other} write the whole name.\n")


@rank_zero_only
def tell_switch(old: str, new: str, names: list[str]) -> None:
    """Say on standard error which settings did not follow to another class."""
    old, new = (path.rpartition(".")[2] for path in (old, new))
    sys.stderr.write(f"{PROGRAM}: {new} replaces {old}, whose settings are dropped: ")
    sys.stderr.write(f"{', '.join(sorted(names))}.\n")
