"""One line about a mistake in a configuration: its key, the rule, and the nearest right name.

jsonargparse answers a misspelt key with every type that it tried, nested as deep as the key lies.
That text is complete, and here it is read back: indentation says where in the configuration each
sentence belongs, the deepest one is the mistake, and difflib finds the name that was meant.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from jsonargparse import ArgumentParser

PROGRAM = "lightning-align"

KEY = re.compile(r'Parser key "([^"]+)"(?: element \d+)?:$')
CLASS = re.compile(r"Problem with given class_path '([^']+)':$")
SUBTYPES = re.compile(r"Subtypes: (.*)$")
GIVEN = re.compile(r"Given value: (.*)$")

# What a sentence says, best first: a misspelt name explains more than a type that did not fit.
UNKNOWN_ARGUMENT = re.compile(r"Option '(?P<name>[^']+)' is not accepted")
MISSING = re.compile(r"the following arguments are required: (?P<names>.+?)(?:\. Got value: .*)?$")
NO_ATTRIBUTE = re.compile(
    r"module '?(?P<module>[\w.]+)'? has no attribute '?(?P<name>\w+)"
    r"|cannot import name '(?P<name2>\w+)' from '(?P<module2>[\w.]+)'"
)
UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\S+)$")
WRONG_CLASS = re.compile(
    r"Import path (?P<cls>\S+) does not correspond to a subclass of (?P<base>\w+)"
)
WRONG_COMMAND = re.compile(
    r"argument subcommand: invalid choice: '(?P<name>[^']*)' \(choose from (?P<names>.*)\)"
)
AMBIGUOUS = re.compile(r"Multiple subclasses with name (?P<name>\w+)\..*: (?P<paths>.*?)\.?$")
NOT_A_CLASS = re.compile(r"Not a valid subclass of (?P<base>\w+)")
WRONG_TYPE = re.compile(r"Expected (?P<rule>.+?)\. Got value: (?P<value>.*)$")


CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
ARGUMENTS_BELOW = " Arguments of the class go under init_args."


@dataclass(frozen=True)
class Sentence:
    """One sentence of jsonargparse, and where in the configuration it belongs."""

    text: str
    path: str  # such as model.init_args.optimizer
    class_path: str  # innermost class around it, or ""
    subtypes: str  # the types that the innermost key may have, as text
    depth: int

    @property
    def owner(self) -> str:
        """Class that the sentence is about: in the value that it quotes, or else around it."""
        _, _, value = self.text.partition("Got value: ")
        return _items(value).get("class_path") or self.class_path

    @property
    def rank(self) -> tuple[int, int]:
        """Deepest first, and there the sentence that explains most."""
        patterns = (UNKNOWN_ARGUMENT, MISSING, NO_ATTRIBUTE, UNKNOWN_CLASS, AMBIGUOUS, WRONG_TYPE)
        kind = next((i for i, p in enumerate(patterns) if p.search(self.text)), len(patterns))
        return -self.depth, kind


def explain(message: str, options: Sequence[str] = ()) -> str | None:
    """Say in a line what jsonargparse said in a page; None if it was not understood.

    Args:
        message: The error message of jsonargparse.
        options: Option strings of the command, such as ``--trainer.max_steps``.
    """
    top_level = _explain_option(message, options)
    if top_level is not None:
        return top_level
    given = GIVEN.findall(message)
    for sentence in sorted(_sentences(message), key=lambda sentence: sentence.rank):
        line = _explain_sentence(sentence, given[-1] if given else "")
        if line is not None:
            return line
    return None


def report(
    message: str, ex: Exception | None, parser: ArgumentParser, subcommands: Iterable[Any] = ()
) -> None:
    """Print an error to standard error in a line, with the way to more.

    Args:
        message: The error message of jsonargparse.
        ex: The exception behind it, if any.
        parser: The parser that refused.
        subcommands: Parsers of its subcommands.

    Raises:
        ArgumentError: If JSONARGPARSE_DEBUG asks for the whole message with its traceback.
    """
    if os.environ.get("JSONARGPARSE_DEBUG") == "true":
        raise ArgumentError(None, message) from ex
    line = explain(message, option_strings([parser, *subcommands]))
    command = getattr(ex, "subcommand_parser", None) or parser
    program = command.prog.replace(" [options]", "")
    more = " All that the parser tried: set JSONARGPARSE_DEBUG=true." if line else ""
    sys.stderr.write(f"{PROGRAM}: {line or message}\nOptions: {program} --help.{more}\n")


def option_strings(parsers: Sequence[ArgumentParser]) -> list[str]:
    """All options of the parsers, such as ``--trainer.max_steps``."""
    found = {name for parser in parsers for name in re.findall(r"--[\w.]+", parser.format_usage())}
    return sorted(name for name in found if not name.endswith(".help"))


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """``" Did you mean X?"`` with the candidate nearest to ``name``, or an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(candidates, reverse=True)}
    nearest = get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[nearest[0]]}?" if nearest else ""


def _explain_option(message: str, options: Sequence[str]) -> str | None:
    """Mistakes in the name of an option or a subcommand, outside any class."""
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        name = found[1].partition("=")[0]
        return f"{name}: no such option.{_nearest_option(name, options)}"
    if found := re.match(r"Subcommand '(\w+)' does not accept option '([^']+)'", message):
        hint = _nearest_option(f"--{found[2]}", options).replace("--", "")
        return f"{found[2]}: no such key of {found[1]}.{hint}"
    if found := re.match(
        r"argument subcommand: invalid choice: '([^']*)' \(choose from (.*)\)", message
    ):
        names = re.findall(r"[\w-]+", found[2])
        hint = did_you_mean(found[1], names) or f" There are: {', '.join(names)}."
        return f"{found[1]}: no such command.{hint}"
    if found := re.match(r'Parser key "(\w+)": File does not exist: \'(.*)\'$', message):
        return f"--{found[1]}: there is no file {found[2]}."
    if found := re.match(r"the following arguments are required: (.+)$", message):
        names = [name.partition(".")[2] or name for name in found[1].split(", ")]
        return f"{', '.join(names)}: must be given."
    return None


def _nearest_option(name: str, options: Sequence[str]) -> str:
    """The nearest option; if its first part is wrong already, that part with the rest as it was."""
    root, _, rest = name.partition(".")
    roots = {option.partition(".")[0] for option in options}
    if rest and root not in roots:
        return did_you_mean(root, roots).replace("?", f".{rest}?")
    return did_you_mean(name, options)


def _sentences(message: str) -> Iterator[Sentence]:
    """Every sentence of the message with the keys and classes above it."""
    stack: list[tuple[int, str, str]] = []  # (column, kind, text)
    for line in filter(str.strip, message.splitlines()):
        text = line.lstrip(" -")
        column = len(line) - len(text)
        while stack and stack[-1][0] >= column:
            stack.pop()
        for kind, pattern in (("key", KEY), ("class", CLASS), ("types", SUBTYPES)):
            if found := pattern.match(text):
                # What follows the types stands beside them, not below.
                column -= kind == "types"
                stack.append((column, kind, found[1]))
                break
        else:
            yield Sentence(
                text=text,
                path=_path(stack),
                class_path=next((t for _, kind, t in reversed(stack) if kind == "class"), ""),
                subtypes=next((t for _, kind, t in reversed(stack) if kind == "types"), ""),
                depth=sum(kind != "types" for _, kind, _ in stack),
            )


def _path(stack: list[tuple[int, str, str]]) -> str:
    path = ""
    for _, kind, text in stack:
        if kind == "key":
            path = f"{path}.{text}" if path else text
        elif kind == "class":
            path += ".init_args"
    return path


def _explain_sentence(sentence: Sentence, given: str) -> str | None:
    text, path = sentence.text, sentence.path
    if found := UNKNOWN_ARGUMENT.search(text):
        return _explain_argument(path, sentence.owner, found["name"])
    if (found := MISSING.search(text)) and sentence.owner:
        inside = path.removesuffix(".init_args") + ".init_args"
        names = ", ".join(f"{inside}.{name}" for name in found["names"].split(", "))
        return f"{names}: must be given for {_short(sentence.owner)}."
    if found := NO_ATTRIBUTE.search(text):
        module, name = found["module"] or found["module2"], found["name"] or found["name2"]
        hint = did_you_mean(name, _names_in(module))
        return f"{path.removesuffix('.init_args')}: no class {name} in {module}.{hint}"
    if found := UNKNOWN_CLASS.search(text):
        hint = did_you_mean(found["name"], _class_names(sentence.subtypes))
        return f"{path}: no class of the name {found['name']}.{hint or ' Give its full path.'}"
    if found := AMBIGUOUS.search(text):
        return f"{path}: {found['name']} is the name of several classes: {found['paths']}."
    if found := WRONG_TYPE.search(text):
        rule = re.sub(r"(?:a )?<class '([^']+)'>", r"\1", found["rule"])
        return f"{path}: must be {rule}, not {found['value']}."
    if found := WRONG_CLASS.search(text):
        return f"{path}: {found['cls']} is no {found['base']}."
    if found := NOT_A_CLASS.search(text):
        return _explain_mapping(path, found["base"], given)
    return None


def _explain_argument(path: str, class_path: str, name: str) -> str:
    """An argument that its class does not have."""
    root, _, rest = name.partition(".")
    owner = path.removesuffix(".init_args")
    if root in CLASS_KEYS or (rest and did_you_mean(root, CLASS_KEYS)):
        # A layer over a class that an earlier one chose: jsonargparse takes all keys for arguments.
        hint = did_you_mean(root, CLASS_KEYS) if root not in CLASS_KEYS else ARGUMENTS_BELOW
        return f"{owner}.{root}: a class is given by class_path and init_args.{hint}"
    hint = did_you_mean(name, argument_names(class_path))
    return f"{owner}.init_args.{name}: no such argument of {_short(class_path)}.{hint}"


def _explain_mapping(path: str, base: str, given: str) -> str | None:
    """A mapping that describes no class, because one of its keys is misspelt or misplaced."""
    keys = _items(given)
    for key in keys:
        if key not in CLASS_KEYS:
            hint = did_you_mean(key, CLASS_KEYS)
            if not hint and "class_path" in keys:
                hint = ARGUMENTS_BELOW
            return f"{path}.{key}: a {base} is given by class_path and init_args.{hint}"
    return None


def _items(text: str) -> dict[str, str]:
    """The outer keys of a printed dict or Namespace, with the text of values that are text."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:  # some object prints itself in another way
        return {}
    pairs: list[tuple[Any, ast.expr]] = []
    if isinstance(tree, ast.Call):
        pairs = [(keyword.arg, keyword.value) for keyword in tree.keywords]
    elif isinstance(tree, ast.Dict):
        pairs = [
            (getattr(k, "value", None), v) for k, v in zip(tree.keys, tree.values, strict=True)
        ]
    return {str(key): str(getattr(value, "value", "")) for key, value in pairs}


def argument_names(class_path: str) -> list[str]:
    """Arguments of a class by the name that a configuration gives them."""
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
        names: list[str] = ArgumentParser().add_class_arguments(cls, fail_untyped=False)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
    return names


def _names_in(module: str) -> list[str]:
    try:
        return dir(importlib.import_module(module))
    except ImportError:
        return []


def _class_names(subtypes: str) -> set[str]:
    """Short names of all imported subclasses of the classes that a type, as text, names."""
    names: set[str] = set()
    for class_path in re.findall(r"[\w.]+\.\w+", subtypes):
        module, _, name = class_path.rpartition(".")
        try:
            base = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            continue
        waiting = [base] if isinstance(base, type) else []
        while waiting:
            cls = waiting.pop()
            names.add(cls.__name__)
            waiting += type.__subclasses__(cls)
    return {name for name in names if not name.startswith("_")}


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]
