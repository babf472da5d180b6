"""Every private API of jsonargparse that we touch, with a test each.

The dependency is capped below the next minor version, because functions are replaced here.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from jsonargparse import ArgumentParser, _signatures, _typehints
from jsonargparse._actions import _ActionHelpClassPath
from jsonargparse._common import parser_context
from jsonargparse._required import iter_required_keys
from jsonargparse._util import import_object


def arguments(parser: ArgumentParser) -> dict[str, argparse.Action]:
    """What a parser takes by the name that a configuration gives it, such as trainer.max_steps."""
    actions = [action for action in parser._actions if not isinstance(action, _ActionHelpClassPath)]
    return {action.dest: action for action in actions}


def shows_help(action: argparse.Action) -> bool:
    """Whether it is an option such as --model.help, which prints the help of a class."""
    return isinstance(action, _ActionHelpClassPath)


def type_of(action: argparse.Action) -> Any:
    """The annotation that the values of an argument must fit; None if it takes no single value."""
    return None if action.nargs else getattr(action, "_typehint", None)


def required(parser: ArgumentParser) -> set[str]:
    """Names of the arguments that must be given."""
    return set(iter_required_keys(parser))


def accepts(parser: ArgumentParser, name: str, value: Any) -> bool:
    """Whether the parser takes the value, with all that is nested in it, for this argument."""
    action = arguments(parser)[name]
    with parser_context(lenient_check=False, load_value_mode=parser.parser_mode):
        try:
            parser._check_value_key(action, deepcopy(value), name, None)
        except (TypeError, ValueError, argparse.ArgumentError):
            return False
    return True


def class_path(base: type, name: str) -> str:
    """Import path of the class that ``name``, short or already a path, means below ``base``.

    Raises:
        ValueError: If several imported classes have the name.
    """
    path: str = _typehints.resolve_class_path_by_name(base, name)
    return path


def class_paths(base: type) -> list[str]:
    """Import paths, as short as they get, of ``base`` and its imported public subclasses."""
    return list(_typehints.get_all_subclass_paths(base, include_abstract=True))


@contextmanager
def whole_class_switches(notice: Callable[[str, str, list[str]], None]) -> Iterator[None]:
    """Let no argument of a class reach another one that a later layer of configuration chose.

    jsonargparse hands on every argument whose name the new class accepts as well: weight_decay
    of an AdamW to an SGD, the monitor of a ModelCheckpoint to an EarlyStopping.

    Args:
        notice: Called with the old class path, the new one and the names of the arguments that
            were dropped; for one switch more than once, because parsing goes in rounds.
    """
    inherit = _typehints.discard_init_args_on_class_path_change

    def discard(_: object, previous: Any, value: Any) -> None:
        if previous and "init_args" in previous and previous["class_path"] != value["class_path"]:
            names = list(dict(previous["init_args"].items(branches=True, nested=False)))
            for name in names:
                previous["init_args"].pop(name)
            if names:
                notice(previous["class_path"], value["class_path"], names)

    _typehints.discard_init_args_on_class_path_change = discard
    try:
        yield
    finally:
        _typehints.discard_init_args_on_class_path_change = inherit


# Whose classes a short name means, in this order, where several packages have one of that name.
AT_HOME = ("lightning_align", "lightning", "torch")


@contextmanager
def short_names_at_home(notice: Callable[[str, list[str]], None] | None = None) -> Iterator[None]:
    """Let ``AdamW`` be torch's, whatever else has been imported, and ``Muon`` ours.

    jsonargparse refuses a short name that several imported classes have, and transformers imports
    PEFT where it is installed, which imports bitsandbytes, which has an AdamW, an Adam and an SGD.

    Args:
        notice: Called with the path that was chosen and the others at home, where there are such;
            for one name more than once, because parsing goes in rounds.
    """
    resolve = _typehints.resolve_class_path_by_name

    def resolve_at_home(cls: Any, name: str) -> str:
        try:
            return resolve(cls, name)
        except ValueError:
            paths = dict.fromkeys(_typehints.get_all_subclass_paths(cls))
            named = [path for path in paths if path.rpartition(".")[2] == name]
            homes = [[p for p in named if p.partition(".")[0] == home] for home in AT_HOME]
            chosen = next(filter(None, homes), [])
            if len(chosen) != 1:
                raise
            others = [path for home in homes for path in home if path != chosen[0]]
            if notice is not None and others:
                notice(chosen[0], others)
            return chosen[0]

    _typehints.resolve_class_path_by_name = resolve_at_home
    try:
        yield
    finally:
        _typehints.resolve_class_path_by_name = resolve


@contextmanager
def subclasses_found_once() -> Iterator[None]:
    """Look for the subclasses of a type once, until another module has been imported.

    jsonargparse looks for them wherever it meets a short name, through everything that is imported:
    most of the time that parsing takes.
    """
    find = _typehints.get_all_subclass_paths
    known: dict[Any, tuple[int, list[str]]] = {}

    def found(*args: Any, **options: Any) -> list[str]:
        asked = (args, tuple(options.items()))
        modules, paths = known.get(asked, (0, []))
        if modules != len(sys.modules):
            modules, paths = known[asked] = len(sys.modules), find(*args, **options)
        return list(paths)

    _typehints.get_all_subclass_paths = found
    try:
        yield
    finally:
        _typehints.get_all_subclass_paths = find


class _Recording:
    """Builds a class, and records what it raises; part of what a module keeps, so it pickles."""

    def __init__(self, build: Callable[..., Any], failed: list[tuple[type, Exception]]) -> None:
        self.build, self.failed = build, failed

    def __call__(self, cls: type, *args: Any, **options: Any) -> Any:
        try:
            return self.build(cls, *args, **options)
        except Exception as error:
            self.failed.append((cls, error))
            raise


@contextmanager
def failures_recorded(failed: list[tuple[type, Exception]]) -> Iterator[None]:
    """Record every class of a configuration whose constructor raises, with what it raised.

    jsonargparse keeps of the errors of a union of types only the first as the cause, and a class
    that is given as a callable, as optimizers are, is built when the parser has long ended.

    Args:
        failed: What is appended to.
    """
    of_types: Any = _typehints
    of_groups: Any = _signatures
    before = of_types.get_class_instantiator

    def recording() -> Any:
        return _Recording(before(), failed)

    of_types.get_class_instantiator = of_groups.get_class_instantiator = recording
    try:
        yield
    finally:
        of_types.get_class_instantiator = of_groups.get_class_instantiator = before


def class_of_help(parser: ArgumentParser) -> tuple[str, Any] | None:
    """Option and class if this is the parser that ``--model.help`` makes to print.

    Args:
        parser: Any.
    """
    found = re.fullmatch(r"Help for --(\S+)\.help=(\S+)", parser.description or "")
    return (f"--{found[1]}", import_object(found[2])) if found else None


def known_classes(hint: Any) -> list[str]:
    """Import paths of the classes that a type takes by class_path; empty if it takes none.

    Args:
        hint: A type, or None.
    """
    return [] if hint is None else list(_typehints.get_all_subclass_paths(hint, closed_types=False))
