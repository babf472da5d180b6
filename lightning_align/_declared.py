"""Arguments of a constructor are of the types that it declares, and text means what YAML reads.

Without this a value of a wrong type goes as far as the first line that computes with it, hours into
a run perhaps, and says there that ``'<' not supported``. Checked is plain data alone: numbers,
text, lists, mappings, times and None. An object is taken for what it is, whatever its class.
"""

import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import InitVar
from datetime import timedelta
from difflib import get_close_matches
from functools import cached_property, wraps
from itertools import islice
from typing import Any, Literal, TypeVar, Union

from lightning_align._errors import argument_error

T = TypeVar("T")

_PLAIN = (str, bytes, int, float, list, tuple, dict, set, types.NoneType, timedelta)
_LISTS = ("builtins", "collections.abc")
_UNREADABLE = object()
_TIME = re.compile(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d)")  # as str(timedelta(...)) writes it
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def declared(cls: type[T]) -> type[T]:
    """Class decorator: refuse arguments of other types, or names, than ``__init__`` declares."""
    function: Any = cls.__init__
    arguments = _Arguments(function)

    @wraps(function)
    def __init__(self: Any, *args: Any, **options: Any) -> None:  # noqa: N807
        # Lightning looks for hyperparameters in one frame of an ``__init__`` after the other, and
        # finds none in this one.
        __class__ = _NoArguments  # noqa: F841
        if type(self).__init__ is __init__:  # a subclass answers for its own arguments
            args, options = arguments.read(self, args, options)
        function(self, *args, **options)

    # getfullargspec, which Lightning asks what a checkpoint may hand on, sees through no wraps.
    __init__.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


class WrongArgumentsError(ValueError, TypeError):
    """A name that ``__init__`` does not have, or one that it lacks: of Python a ``TypeError``."""


class _NoArguments:
    def __init__(self) -> None:
        pass


class _Arguments:
    """What an ``__init__`` declares."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def read(
        self, instance: Any, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call, read as the types that are declared."""
        where = type(instance).__name__
        self._check_names(where, options)
        given = self.signature.bind_partial(instance, *args, **options)
        self._check_missing(where, given.arguments)
        for name, hint in self.hints.items():
            if name in given.arguments:
                given.arguments[name] = read(where, name, given.arguments[name], hint)
        return given.args[1:], given.kwargs

    def _check_names(self, where: str, options: dict[str, Any]) -> None:
        names = self.signature.parameters
        takes_any_name = any(each.kind == each.VAR_KEYWORD for each in names.values())
        for name, value in options.items() if not takes_any_name else ():
            if name not in names:
                near = get_close_matches(name, [*names][1:], 1)
                way_out = f"Did you mean {near[0]}" if near else f"help({where}) has them"
                rule = "there is no such argument"
                raise WrongArgumentsError(argument_error(where, name, value, rule, way_out))

    def _check_missing(self, where: str, given: Mapping[str, Any]) -> None:
        missing = [
            name
            for name, each in self.signature.parameters.items()
            if each.default is each.empty
            and name not in given
            and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        ]
        if missing:
            raise WrongArgumentsError(f"{where}({', '.join(missing)}): must be given.")

    @cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.function)

    @cached_property
    def hints(self) -> dict[str, Any]:
        """Types by argument, of those that can be resolved without what only checkers import."""
        found = {}
        for name, hint in self.function.__annotations__.items():
            alone = types.SimpleNamespace(__annotations__={name: hint})
            try:
                found[name] = typing.get_type_hints(alone, self.function.__globals__)[name]
            except (NameError, AttributeError, TypeError):
                continue
        return found


def read(where: str, argument: str, value: Any, hint: Any) -> Any:
    """``value`` if it is of the type ``hint``, or what its text means there.

    Args:
        where: Class the user called.
        argument: Name of the argument.
        value: What was given.
        hint: The type that is declared.

    Raises:
        ValueError: If it is neither.
    """
    if fits(value, hint):
        return value
    if isinstance(value, str) and (meant := _meant(value, hint)) is not _UNREADABLE:
        return meant
    way_out = ""
    if _allows(hint, timedelta) and isinstance(value, (int, float)):
        way_out = f"Write datetime.timedelta(seconds={value})"
    elif str(value).startswith("torch."):
        way_out = f"Write {str(value).removeprefix('torch.')!r}"
    elif isinstance(value, float) and value.is_integer() and _allows(hint, int):
        way_out = f"Write {int(value)}"
    elif isinstance(value, str) and fits([value], hint):
        way_out = f"Write [{value!r}]"
    raise argument_error(where, argument, value, f"must be {described(hint)}", way_out)


def fits(value: Any, hint: Any) -> bool:
    """Whether plain data is of a type; anything else is."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if isinstance(hint, InitVar):
        return fits(value, hint.type)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(value is each or (value == each and type(value) is type(each)) for each in inner)
    if hint in (None, types.NoneType):
        return value is None
    if not isinstance(value, _PLAIN):
        return _is_object_for(value, hint)
    if hint in (int, float, bool):
        return _is_number(value, hint)
    if hint in (str, timedelta):
        return isinstance(value, hint)
    kind: Any = origin or hint
    if not isinstance(kind, type) or kind is object:
        return True
    return _fits_class(value, kind, inner)


def _fits_class(value: Any, kind: Any, inner: tuple[Any, ...]) -> bool:
    """Whether plain data is of a class, or a container that may stand for one."""
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping) and _all_fit(value.values(), inner[1:])
    if issubclass(kind, os.PathLike):
        return isinstance(value, str)
    if kind is Callable:
        return True  # text or a mapping may name what is called: who calls it knows
    if not issubclass(kind, Iterable) or issubclass(kind, str):
        return isinstance(value, kind)
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return False
    if kind is tuple and inner and inner[-1] is not ...:
        return len(list(value)) == len(inner) and all(map(fits, value, inner))
    return _all_fit(value, inner)


def _all_fit(values: Iterable[Any], inner: tuple[Any, ...]) -> bool:
    """Whether the first of many values are of a type; who is mistaken is so in these."""
    return not inner or all(fits(each, inner[0]) for each in islice(values, 100))


def _is_object_for(value: Any, hint: Any) -> bool:
    """Whether an object may stand for plain data: numbers of NumPy and torch, and paths, do."""
    if hint is int:
        return hasattr(value, "__index__")
    if hint in (float, bool):
        return hasattr(value, "__float__") or hasattr(value, "__bool__")
    if hint is str:
        return isinstance(value, os.PathLike)
    return hint is not timedelta


def _is_number(value: Any, hint: type) -> bool:
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    return isinstance(value, int) or (hint is float and isinstance(value, float))


def _meant(text: str, hint: Any) -> Any:
    """What a text means as a value of a type, ``_UNREADABLE`` if it means none."""
    import yaml

    candidates: list[Any] = []
    if (time := _TIME.fullmatch(text)) and _allows(hint, timedelta):
        days, hours, minutes, seconds = (int(each or 0) for each in time.groups())
        candidates.append(timedelta(days, seconds, hours=hours, minutes=minutes))
    with suppress(yaml.YAMLError, ValueError):
        candidates.append(yaml.safe_load(text))
    if _NUMBER.fullmatch(text):  # YAML 1.1 takes 1e-3 for text
        candidates.append(float(text))
    fitting = [each for each in candidates if not isinstance(each, str) and fits(each, hint)]
    return fitting[0] if fitting else _UNREADABLE


def _allows(hint: Any, kind: type) -> bool:
    return hint is kind or any(_allows(each, kind) for each in typing.get_args(hint))


def described(hint: Any) -> str:
    """A type in words, for the rule of an error."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, InitVar):
        return described(hint.type)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(described, inner)))
    if origin is Literal:
        *most, last = map(repr, inner)
        return f"{', '.join(most)} or {last}" if most else last
    if hint in (None, types.NoneType):
        return "None"
    words = {int: "a whole number, an int", float: "a number", bool: "True or False", str: "text"}
    if hint in words:
        return words[hint]
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a mapping"
    if isinstance(kind, type) and issubclass(kind, Iterable) and kind.__module__ in _LISTS:
        of = [each for each in inner if each is not ...]
        number = f"{len(of)} " if kind is tuple and of else ""
        return f"a list of {number}{_plural(of[0])}" if of else "a list"
    name = getattr(kind, "__name__", str(kind))
    return f"a {name}"


def _plural(hint: Any) -> str:
    words = {int: "whole numbers", float: "numbers", bool: "True or False", str: "texts"}
    return words.get(hint) or described(hint)
