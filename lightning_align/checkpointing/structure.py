"""A nested state taken apart and put together: containers copied, tensors handed to the caller.

Containers that occur twice stay one object, cycles included. What is neither a container, a tensor
nor immutable is deep-copied (by torch.save where it does not let itself), so nothing in the copy
changes when training goes on.
"""

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from lightning_align._errors import argument_error

_IMMUTABLE = frozenset({int, float, str, bool, bytes, type(None), complex})


class Copier:
    """Copies nested states; objects of the given types become what their function returns.

    Args:
        replace: Exact type -> function of the object.
        replace_kin: Type -> function of the objects of it and its subclasses.
    """

    def __init__(
        self,
        replace: dict[type, Callable[[Any], Any]],
        replace_kin: dict[type, Callable[[Any], Any]] | None = None,
    ) -> None:
        self._replace = replace
        self._replace_kin = replace_kin or {}
        self._memo: dict[int, Any] = {}
        self._state: Any = None

    def copy(self, state: Any) -> Any:
        """Copy a state.

        Args:
            state: Nested dicts, lists and tuples.

        Raises:
            ValueError: If something in it cannot be copied.
        """
        self._state = state
        self._memo = {}
        try:
            return self.walk(state)
        except RecursionError:
            rule = "it is nested too deeply, as for torch.save"
            raise argument_error(
                "SnapshotEngine.save", "state", type(state).__name__, rule, "Flatten it"
            ) from None
        finally:
            self._state = None
            self._memo = {}

    def walk(self, value: Any) -> Any:
        """Copy a part of the state, or of what a function returns; it must live until the end."""
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
            for item in value:  # a comprehension would be a frame more for each level
                result.append(self.walk(item))
            return result
        elif kind is tuple:
            items = []
            for item in value:
                items.append(self.walk(item))  # noqa: PERF401
            result = tuple(items)
        elif isinstance(value, tuple) and hasattr(value, "_fields"):
            result = kind(*[self.walk(item) for item in value])
        else:
            kin = next((k for k in self._replace_kin if isinstance(value, k)), None)
            result = self._replace_kin[kin](value) if kin else self._deepcopy(value)
        self._memo[id(value)] = result
        return result

    def _walk_dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        kind = type(value)
        plain = kind is dict or kind is OrderedDict
        result: dict[Any, Any] = kind() if plain else copy.copy(value)
        self._memo[id(value)] = result
        walk, immutable = self.walk, _IMMUTABLE
        for key, item in value.items():
            own_key = walk(key) if plain and type(key) not in immutable else key
            result[own_key] = item if type(item) in immutable else walk(item)
        attributes = getattr(value, "__dict__", None)  # state_dict() keeps versions in _metadata
        if attributes:
            result.__dict__.update({key: walk(item) for key, item in attributes.items()})
        return result

    def _deepcopy(self, value: Any) -> Any:
        try:
            return copy.deepcopy(value)
        except Exception:  # such as a tensor with a history, in an object
            try:
                return _saved_and_loaded(value)
            except Exception as error:
                raise cannot_be_saved(value, self._state, error) from error


def cannot_be_saved(value: Any, state: Any, error: Exception) -> ValueError:
    """The error for what torch.save does not take either."""
    rule = f"a {type(value).__name__} cannot be copied or saved ({error})"
    way_out = "Keep it out of the state, or give it a state_dict of plain values"
    return argument_error("SnapshotEngine.save", "state", place_of(state, value), rule, way_out)


def _saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def place_of(state: Any, wanted: Any) -> str:
    """Where in a nested state an object is, as in "callbacks/EMA/weights".

    Args:
        state: Nested dicts, lists and tuples.
        wanted: The very object, not one that is equal.
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
