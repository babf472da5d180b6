"""One line about a mistake in a configuration: its place, the rule, and the nearest right name.

jsonargparse answers a mistake with every type that it tried, nested as deep as the mistake lies.
Here the configuration is walked again as it was given: layers are laid over each other, and what
the parser refuses is followed down, against the names that the parser and the signatures of the
classes know, until the refusal has a place. What is accepted is never looked into.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from argparse import Action, ArgumentError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from types import UnionType
from typing import Any, Union, get_args, get_origin

import fsspec
import yaml
from jsonargparse import ArgumentParser

from lightning_align._compat.jsonargparse_parsing import (
    accepts,
    arguments,
    class_path,
    class_paths,
    required,
    type_of,
)

PROGRAM = "lightning-align"

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
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
        ArgumentError: If JSONARGPARSE_DEBUG asks for the whole message with its traceback.
    """
    if os.environ.get("JSONARGPARSE_DEBUG") == "true":
        raise ArgumentError(None, message) from ex
    line = None
    if not isinstance(
        ex, (yaml.YAMLError, RecursionError)
    ):  # a file that could not be read is named
        with suppress(Exception):  # what explains must not hide what it explains
            line = explain(parser, getattr(parser, "args", []), commands)
    command = getattr(ex, "subcommand_parser", None) or parser
    program = command.prog.replace(" [options]", "")
    more = " All that the parser tried: set JSONARGPARSE_DEBUG=true." if line else ""
    sys.stderr.write(f"{PROGRAM}: {line or message}\nOptions: {program} --help.{more}\n")


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
    found = {name for parser in parsers for name in re.findall(r"--[\w.]+", parser.format_usage())}
    return sorted(name for name in found if not name.endswith(".help"))


def argument_names(path: str) -> list[str]:
    """Arguments of a class by the name that a configuration gives them."""
    module, _, name = path.rpartition(".")
    try:
        return list(arguments(_class_parser(getattr(importlib.import_module(module), name))))
    except (ImportError, AttributeError, ValueError, TypeError):
        return []


def read_layer(path: str) -> Any:
    """What a YAML file holds; an OSError or the like if there is none."""
    with fsspec.open(path, encoding="utf-8", mode="rt") as file:
        try:
            return yaml.safe_load(file)
        except ValueError as error:  # an integer of 5000 digits, bytes that are no text
            raise yaml.YAMLError(error) from None


# The layers


def _mistakes(parser: ArgumentParser, args: Sequence[str]) -> Iterator[Mistake]:
    """Mistakes of a command line: in names of its own, then in what all layers give together."""
    known, given = arguments(parser), dict[str, Any]()
    for option, text in _options(args):
        name = next((key for key, action in known.items() if option in action.option_strings), None)
        if name == "config":
            try:
                given = _over(given, dict(_flat(read_layer(text), known)))
            except (OSError, ValueError, ImportError):
                yield NAME, f"--config: there is no file {text}."
            continue
        value: Any = _parsed(text)
        for key in reversed([name] if name else option.lstrip("-").split(".")):
            value = {key: value}
        for key, inside in _flat(value, known):
            if key not in known:
                options = option_strings([parser])
                yield NAME, f"{option}: no such option.{_nearest(option, options)}"
            elif not text:  # a flag, or a value is missing, which the parser says in a line
                continue
            elif option.endswith("+"):
                added = inside if isinstance(inside, list) else [inside]
                given[key] = [*(given.get(key) or []), *added]
            else:
                given = _over(given, {key: inside})
    yield from _arguments(parser, given, "", parser.prog.replace(" [options]", "").split()[-1])


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every option with its value; the text is empty if none follows."""
    for word, following in zip(args, [*args[1:], ""], strict=True):
        if found := re.match(r"(--\w[^=]*|-[a-zA-Z])(=?)(.*)", word, re.DOTALL):
            alone = not (found[2] or found[3])
            follows = alone and not re.match(r"--?[a-zA-Z]", following)
            yield found[1], following if follows else found[3]


def _parsed(text: str) -> Any:
    """Mappings and lists as such; all else stays text, which the parser reads in its own way."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (dict, list)) else text


def _flat(layer: Any, known: Mapping[str, Action], above: str = "") -> Iterator[tuple[str, Any]]:
    """Values by the names of arguments, such as trainer.max_steps; other keys as they stand."""
    for key, value in layer.items() if isinstance(layer, Mapping) else ():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and any(other.startswith(f"{name}.") for other in known):
            yield from _flat(value, known, f"{name}.")
        else:
            yield name, value


def _over(old: Any, new: Any) -> Any:
    """One value over another, as layers lie: another class begins anew, a list replaces a list."""
    if isinstance(old, list) and old and isinstance(new, Mapping):
        return [*old[:-1], _over(old[-1], new)]  # an option goes to the element before it
    if isinstance(old, str) and isinstance(new, Mapping):
        old = {"class_path": old}
    if not isinstance(old, Mapping):
        return new
    if isinstance(new, str) and _short(new) == _short(old.get("class_path")):
        new = {"class_path": new}
    if not isinstance(new, Mapping):
        return new
    if "class_path" in old:
        if _short(new.get("class_path", old["class_path"])) != _short(old["class_path"]):
            return new
        if not any(key in CLASS_KEYS for key in new):
            new = {"init_args": new}  # short for the arguments of a class that is known already
    return {**old, **{key: _over(old.get(key), value) for key, value in new.items()}}


# The values


def _arguments(
    parser: ArgumentParser, given: Mapping[str, Any], above: str, owner: str
) -> Iterator[Mistake]:
    """Mistakes in the names and values of a parser's arguments, and which of them are missing."""
    known = arguments(parser)
    for name, value in given.items():
        if name not in known:
            kind = "argument" if above else "key"
            yield NAME, f"{above}{name}: no such {kind} of {owner}.{_nearest(name, known)}"
        elif (hint := type_of(known[name])) and not accepts(parser, name, value):
            yield from _value(value, hint, f"{above}{name}")
    missing = [name for name in known if name in required(parser) - set(given)]
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
            yield from _value(read_layer(value), hint, path)
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
        if key not in CLASS_KEYS:
            hint = did_you_mean(key, CLASS_KEYS)
            hint = hint or (ARGUMENTS_BELOW if "class_path" in value else "")
            yield NAME, f"{path}.{key}: a class is given by class_path and init_args.{hint}"
    if not isinstance(value.get("class_path"), str):
        return
    cls = _named(value["class_path"], [base for base, _ in classes])
    if isinstance(cls, str):
        yield NAME, f"{path}: {cls}"
        return
    parser = _class_parser(cls, next(skip for base, skip in classes if issubclass(cls, base)))
    given = dict(_flat(value.get("init_args"), arguments(parser)))
    yield from _arguments(parser, given, f"{path}.init_args.", cls.__name__)


def _named(name: str, bases: Sequence[type]) -> type | str:
    """The class of that name or path below one of ``bases``, or else what is wrong with it."""
    try:
        path = next((p for base in bases if "." in (p := class_path(base, name))), None)
    except ValueError:
        paths = [path for base in bases for path in class_paths(base) if _short(path) == name]
        return f"{name} is the name of several classes: {', '.join(paths)}."
    if path is None:
        names = [_short(path) for base in bases for path in class_paths(base)]
        hint = did_you_mean(name, names) or " Give its full path."
        return f"no class of the name {name}.{hint}"
    module, _, short = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), short)
    except ImportError as error:
        return f"{path} cannot be imported: {error}."
    except AttributeError:
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


def _classes(hint: Any) -> Iterator[tuple[type, int]]:
    """Classes that a type takes by class_path, with how many arguments a caller will pass."""
    inner = get_args(hint)
    if get_origin(hint) is Callable:
        passed = len(inner[0]) if inner and isinstance(inner[0], list) else 0
        yield from ((cls, passed) for cls, _ in _classes(inner[-1] if inner else None))
    elif inner:
        for part in inner:
            yield from _classes(part)
    elif isinstance(hint, type) and hint.__module__ not in ("builtins", "pathlib", "typing"):
        yield hint, 0


def _rule(hint: Any) -> str:
    """A type in words."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = [part.__name__ if isinstance(part, type) else str(part) for part in parts]
    return " or ".join(name for name in names if name != "NoneType").replace("typing.", "")


def _nearest(name: str, known: Iterable[str]) -> str:
    """The nearest name of the same depth; if its first part is wrong already, only that mended."""
    root, dot, rest = name.partition(".")
    roots = {other.partition(".")[0] for other in known}
    if root not in roots:
        return did_you_mean(root, roots).replace("?", f"{dot}{rest}?")
    depth = name.count(".") + 1
    return did_you_mean(name, {".".join(other.split(".")[:depth]) for other in known})


def _short(path: Any) -> str:
    return str(path).rpartition(".")[2]
