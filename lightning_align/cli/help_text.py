"""Help as a reader wants it: what an option is for, its kind, its default.

Descriptions are the docstrings of functions and classes, so that they say the same everywhere.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import DefaultHelpFormatter
from typing_extensions import override

from lightning_align._compat import jsonargparse_parsing as parsing

_KINDS: dict[Any, str] = {
    int: "INT",
    float: "NUMBER",
    str: "TEXT",
    bool: "true|false",
    Path: "PATH",
    list: "LIST",
    Sequence: "LIST",
    tuple: "LIST",
    dict: "MAPPING",
}
_LONGEST = 40  # characters of choices that are all shown
_UNSAID = (None, False, argparse.SUPPRESS)
_FEW_OPTIONS = 12
_FEW_CLASSES = 60  # of which some are named; of more, as torch's modules are, a list says nothing
_NAMED = 12


class PlainHelp(DefaultHelpFormatter):
    """Formatter of the help of all commands."""

    @override
    def _get_help_string(self, action: argparse.Action) -> str:
        text = plain(action.help or "")
        if parsing.shows_help(action):
            return text
        if action.required and action.option_strings:
            text = f"{text} (required)"
        elif not any(action.default is each for each in _UNSAID) and action.option_strings:
            text = f"{text} (default: %(default)s)"
        return text + _classes_told(parsing.type_of(action))

    @override
    def _format_usage(self, usage: str | None, actions: Any, *args: Any, **kwargs: Any) -> str:
        """Of many options only those that must be given."""
        known = [each for each in actions if each.help != argparse.SUPPRESS]
        if usage is None and len(known) > _FEW_OPTIONS:
            shown = [each for each in known if each.required or not each.option_strings]
            name = self._prog.replace(" [options]", "")
            words = [self._format_actions_usage_of(each) for each in shown]
            return f"usage: {' '.join([name, *words, '[options]'])}\n\n"
        return super()._format_usage(usage, actions, *args, **kwargs).replace(" [options] ", " ")

    def _format_actions_usage_of(self, action: argparse.Action) -> str:
        default = self._get_default_metavar_for_optional(action)
        if action.option_strings:
            return f"{action.option_strings[-1]} {self._format_args(action, default)}"
        return self._format_args(action, self._get_default_metavar_for_positional(action))

    @override
    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        kind = "" if parsing.shows_help(action) else kind_of(parsing.type_of(action))
        if kind and action.option_strings and not action.choices:
            return kind
        return super()._format_args(action, default_metavar)

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs filled, lines that are indented or drawn left as they are."""
        parts = re.split(r"\n\s*\n", text)
        filled = [
            part
            if re.search(r"^\s", part, re.M)
            else super(PlainHelp, self)._fill_text(part, width, indent)
            for part in parts
        ]
        return "\n\n".join(filled)


def plain(text: str) -> str:
    """A docstring's text without the marks of Python and Sphinx.

    Args:
        text: A part of a docstring.
    """
    text = re.sub(r":\w+:`~?([^`<]*?\.)?(\w+)`", r"\2", text)  # :class:`~a.b.C`
    text = text.replace("``", "")
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{python}\b", yaml, text)
    return text


def kind_of(hint: Any) -> str:
    """What kind of value an option takes, in a word or two; empty if a word would not do.

    Args:
        hint: The type, or None.
    """
    if hint is None or hint is Any:
        return ""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        words = "|".join(map(str, inner))
        return words if len(words) < _LONGEST else "NAME"
    if origin in (Union, UnionType):
        kinds = dict.fromkeys(kind_of(each) for each in inner if each is not type(None))
        return "|".join(kinds) if "" not in kinds and len(kinds) <= 3 else ""
    if (origin or hint) in _KINDS:
        return _KINDS[origin or hint]
    return "CLASS" if parsing.known_classes(hint) else ""


def _classes_told(hint: Any) -> str:
    """The nearest classes that a type takes, ours first."""
    paths = parsing.known_classes(hint)
    if not paths:
        return ""
    if len(paths) > _FEW_CLASSES:
        return " A class by its path."
    names = [path.rpartition(".")[2] for path in sorted(paths, key=_distance)]
    names = list(dict.fromkeys(names))
    more = f", {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" Known classes: {', '.join(names[:_NAMED])}{more}."


def _distance(path: str) -> tuple[int, str]:
    order = ("lightning_align", "torch", "lightning")
    package = path.partition(".")[0]
    depth = order.index(package) if package in order else len(order)
    return depth, path.rpartition(".")[2]


def described(cls: Any) -> str:
    """What a class or function is, from its docstring up to the arguments.

    Args:
        cls: That has a docstring.
    """
    text = inspect.getdoc(cls) or ""
    section = re.search(r"^(Args|Raises|Example|Examples|Returns|Yields):", text, re.M)
    return plain(text[: section.start()] if section else text).strip()
