"""A nested state taken apart and put together: containers copied, tensors handed to the caller.

Containers that occur twice stay one object, cycles included. What is neither a container, a tensor
nor immutable is deep-copied, so nothing in the copy changes when training goes on.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from lightning_align._errors import argument_error

_IMMUTABLE = frozenset({int, float, str, bool, bytes, type(None), complex})


class Copier:
    """Copies nested states; objects of the given types become what their function returns.

    Args:
        replace: Exact type -> function of the object.
    """

    def __init__(self, replace: dict[type, Callable[[Any], Any]]) -> None:
        self._replace = replace
        self._memo: dict[int, Any] = {}
        self._state: Any = None

    def copy(self, state: Any) -> Any:
        """Copy a state.

        Args:
            state: Nested dicts, lists and tuples.
        """
        self._state = state
        self._memo = {}
        try:
            return self._walk(state)
        finally:
            self._state = None
            self._memo = {}

    def _walk(self, value: Any) -> Any:
        kind = type(value)
        if kind in _IMMUTABLE:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        replace = self._replace.get(kind)
        if replace is not None:
            result = replace(value)
        elif isinstance(value, dict):
            return self._walk_dict(value)
        elif kind is list:
            result = self._memo[id(value)] = []
            result.extend([self._walk(item) for item in value])
            return result
        elif kind is tuple:
            result = tuple([self._walk(item) for item in value])
        elif isinstance(value, tuple) and hasattr(value, "_fields"):
            result = kind(*[self._walk(item) for item in value])
        else:
            result = self._deepcopy(value)
        self._memo[id(value)] = result
        return result

    def _walk_dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        kind = type(value)
        plain = kind is dict or kind is OrderedDict
        result: dict[Any, Any] = kind() if plain else copy.copy(value)
        self._memo[id(value)] = result
        walk, immutable = self._walk, _IMMUTABLE
        for key, item in value.items():
            result[key] = item if type(item) in immutable else walk(item)
        attributes = getattr(value, "__dict__", None)  # state_dict() keeps versions in _metadata
        if attributes:
            result.__dict__.update({key: walk(item) for key, item in attributes.items()})
        return result

    def _deepcopy(self, value: Any) -> Any:
        try:
            return copy.deepcopy(value)
        except Exception as error:
            raise argument_error(
                "SnapshotEngine.save",
                "state",
                place_of(self._state, value),
                f"a {type(value).__name__} cannot be copied ({error})",
                "Keep it out of the state, or give it a state_dict of plain values",
            ) from error


def place_of(state: Any, wanted: Any) -> str:
    """Where in a nested state an object is, as in "callbacks/EMA/weights".

    Args:
        state: Nested dicts, lists and tuples.
        wanted: The object.
    """
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", state)]
    while todo:
        path, value = todo.pop()
        if value is wanted:
            return path or "the state itself"
        if id(value) in seen:
            continue
        seen.add(id(value))
        items: Any = ()
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        todo += [(f"{path}/{key}" if path else str(key), item) for key, item in items]
    return "an attribute"
