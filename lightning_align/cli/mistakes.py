"""One line about a mistake in a configuration: its place, the rule, and the nearest right name.

jsonargparse answers a mistake with every type that it tried, nested as deep as the mistake lies.
Here the configuration is walked again as it was given (`given.py`): what the parser refuses is
followed down, against the names that the parser and the signatures of the classes know, until the
refusal has a place. What is accepted is never looked into.
"""

from __future__ import annotations

import importlib
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser

from lightning_align._compat import jsonargparse_parsing as parsing
from lightning_align.cli import given as layers
from lightning_align.cli.failures import DEBUG, debugging

PROGRAM = "lightning-align"

ARGUMENTS_BELOW = " Arguments of the class go under init_args."

# How much a mistake explains: a misspelt name is why something is missing or of another type.
NAME, MISSING, TYPE = range(3)
Mistake = tuple[int, str]


def report(
    message: str,
    ex: Exception | None,
    parser: ArgumentParser,
    commands: Mapping[str, ArgumentParser] | None = None,
) -> None:
    """Print an error to standard error in a line, with the way to more.

    Args:
        message: The error message of jsonargparse.
        ex: The exception behind it, if any.
        parser: The parser that refused.
        commands: Parsers of its subcommands, by name.

    Raises:
        ArgumentError: If ``--debug`` asks for the whole message with its traceback.
    """
    if debugging():
        raise ArgumentError(None, message) from ex
    line = None
    with suppress(Exception):  # what explains must not hide what it explains
        if not isinstance(ex, (yaml.YAMLError, RecursionError)):  # of a file, which is named
            line = explain(parser, getattr(parser, "args", []), commands)
    command = getattr(ex, "subcommand_parser", None) or parser
    program = command.prog.replace(" [options]", "")
    more = f" All that the parser tried: add {DEBUG}." if line else ""
    name = program.partition(" ")[0]
    sys.stderr.write(f"{name}: {line or message}\nOptions: {program} --help.{more}\n")


def explain(
    parser: ArgumentParser,
    args: Sequence[str],
    commands: Mapping[str, ArgumentParser] | None = None,
) -> str | None:
    """The mistake in the arguments of a command that explains most; None if there is none.

    Args:
        parser: The parser that refused them.
        args: The words of the command line.
        commands: Parsers of subcommands, by name.
    """
    if commands:
        at = next((i for i, word in enumerate(args) if word in commands), None)
        if at is None:
            wrong = next((word for word in args if not word.startswith("-")), None)
            hint = did_you_mean(wrong or "", commands) or f" There are: {', '.join(commands)}."
            return f"{wrong}: no such command.{hint}" if wrong else None
        parser, args = commands[args[at]], args[at + 1 :]
    return min(_mistakes(parser, args), default=(0, None), key=lambda mistake: mistake[0])[1]


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """``" Did you mean X?"`` with the candidate nearest to ``name``, or an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(candidates, reverse=True)}
    nearest = get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[nearest[0]]}?" if nearest else ""


def option_strings(parsers: Sequence[ArgumentParser]) -> list[str]:
    """All options of the parsers, such as ``--trainer.max_steps``."""
    actions = [action for parser in parsers for action in parsing.arguments(parser).values()]
    found = {name for action in actions for name in action.option_strings}
    return sorted(name for name in found if name.startswith("--") and not name.endswith("+"))


def argument_names(path: str) -> list[str]:
    """Arguments of a class by the name that a configuration gives them."""
    module, _, name = path.rpartition(".")
    try:
        return list(
            parsing.arguments(_class_parser(getattr(importlib.import_module(module), name)))
        )
    except (ImportError, AttributeError, ValueError, TypeError):
        return []


def _mistakes(parser: ArgumentParser, args: Sequence[str]) -> Iterator[Mistake]:
    """Mistakes of a command line: in names of its own, then in what all layers give together."""
    known, given = parsing.arguments(parser), dict[str, Any]()
    named = {option: name for name in known for option in known[name].option_strings}
    for option, text in layers.options_with_values(args):
        if named.get(option) == "config":
            try:
                layers.lay_over(given, layers.read_layer(text), known)
            except (OSError, ValueError, ImportError):
                yield NAME, f"--config: there is no file {text}."
            continue
        layer = layers.option_as_layer(named.get(option, option.lstrip("-")), text)
        if any(key not in known for key, _ in layers.by_argument(layer, known)):
            yield NAME, f"{option}: no such option.{_nearest(option, option_strings([parser]))}"
        elif text:  # else it is a flag, or its value is missing, which the parser says in a line
            layers.lay_over(given, layer, known, append=option.endswith("+"))
    yield from _arguments(parser, given, "", parser.prog.replace(" [options]", "").split()[-1])


def _arguments(
    parser: ArgumentParser, given: Mapping[str, Any], above: str, owner: str
) -> Iterator[Mistake]:
    """Mistakes in the names and values of a parser's arguments, and which of them are missing."""
    known = parsing.arguments(parser)
    for name, value in given.items():
        if name not in known:
            kind = "argument" if above else "key"
            yield NAME, f"{above}{name}: no such {kind} of {owner}.{_nearest(name, known)}"
        elif (hint := parsing.type_of(known[name])) and not parsing.accepts(parser, name, value):
            yield from _value(value, hint, f"{above}{name}")
    missing = [name for name in known if name in parsing.required(parser) - set(given)]
    if missing := [f"{above}{name}" for name in missing if known[name].option_strings]:
        yield MISSING, f"{', '.join(missing)}: must be given{f' for {owner}' if above else ''}."


def _value(value: Any, hint: Any, path: str) -> Iterator[Mistake]:
    """Mistakes in a value that its argument refuses."""
    classes = list(_classes(hint))
    if classes and isinstance(value, list):
        for i, item in enumerate(value):
            yield from _value(item, hint, f"{path}[{i}]" if len(value) > 1 else path)
    elif classes and isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")):
        if os.path.isfile(value):  # else it may lie beside the file that names it
            yield from _value(layers.read_layer(value), hint, path)
    elif classes and isinstance(value, (str, Mapping)):
        value = {"class_path": value} if isinstance(value, str) else value
        yield from _class(value, classes, path)
    else:
        yield TYPE, f"{path}: must be {_rule(hint)}, not {value}."


def _class(
    value: Mapping[str, Any], classes: Sequence[tuple[type, int]], path: str
) -> Iterator[Mistake]:
    """Mistakes in the mapping that describes a class."""
    for key in map(str, value):
        if key not in layers.CLASS_KEYS:
            hint = did_you_mean(key, layers.CLASS_KEYS)
            hint = hint or (ARGUMENTS_BELOW if "class_path" in value else "")
            yield NAME, f"{path}.{key}: a class is given by class_path and init_args.{hint}"
    if not isinstance(value.get("class_path"), str):
        return
    cls = _named(value["class_path"], [base for base, _ in classes])
    if isinstance(cls, str):
        yield NAME, f"{path}: {cls}"
        return
    parser = _class_parser(cls, next(skip for base, skip in classes if issubclass(cls, base)))
    given = dict(layers.by_argument(value.get("init_args"), parsing.arguments(parser)))
    yield from _arguments(parser, given, f"{path}.init_args.", cls.__name__)


def _named(name: str, bases: Sequence[type]) -> type | str:
    """The class of that name or path below one of ``bases``, or else what is wrong with it."""
    below = list(dict.fromkeys(path for base in bases for path in parsing.class_paths(base)))
    try:
        path = next((p for base in bases if "." in (p := parsing.class_path(base, name))), None)
    except ValueError:
        paths = [path for path in below if layers.short_name(path) == name]
        return f"{name} is the name of several classes: {', '.join(paths)}."
    if path is None:
        hint = did_you_mean(name, map(layers.short_name, below)) or " Give its full path."
        return f"no class of the name {name}.{hint}"
    module, _, short = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), short, None)
    except ImportError as error:
        return f"{path} cannot be imported: {error}."
    if cls is None:
        hint = did_you_mean(short, dir(importlib.import_module(module)))
        return f"no class {short} in {module}.{hint}"
    if not (isinstance(cls, type) and issubclass(cls, tuple(bases))):
        return f"{path} is no {' or '.join(base.__name__ for base in bases)}."
    return cls


def _class_parser(cls: type, skip: int = 0) -> ArgumentParser:
    """A parser of the arguments of a class, less those first ones that its caller passes."""
    parser = ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, skip={skip} if skip else None)
    return parser


def _classes(hint: Any, passed: int = 0) -> Iterator[tuple[type, int]]:
    """Classes that a type takes by class_path, with how many arguments a caller will pass."""
    inner = get_args(hint)
    if get_origin(hint) is Callable and inner:
        passed, inner = len(inner[0]) if isinstance(inner[0], list) else 0, inner[-1:]
    if inner:
        for part in inner:
            yield from _classes(part, passed)
    elif isinstance(hint, type) and hint.__module__ not in ("builtins", "pathlib", "typing"):
        yield hint, passed


def _rule(hint: Any) -> str:
    """A type in words."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = [
        part.__name__ if isinstance(part, type) and not get_args(part) else str(part)
        for part in parts  # tuple[float, float] is a type in Python 3.10
    ]
    return " or ".join(name for name in names if name != "NoneType").replace("typing.", "")


def _nearest(name: str, known: Iterable[str]) -> str:
    """The nearest name of the same depth; if its first part is wrong already, only that mended."""
    root, dot, rest = name.partition(".")
    roots = {other.partition(".")[0] for other in known}
    if root not in roots:
        return did_you_mean(root, roots).replace("?", f"{dot}{rest}?")
    depth = name.count(".") + 1
    return did_you_mean(name, {".".join(other.split(".")[:depth]) for other in known})
