"""Values of attributes as plain data that loads with ``weights_only=True``, and back in place.

A value becomes what torch.load trusts: numbers, text, tensors, lists, and tuples that begin with a
kind. Where the same value is in the module that resumes, it is filled and not replaced: whoever
holds it, an optimizer its tensors or a callback its list, goes on holding it. Only classes that are
there already are ever made use of; nothing is imported, and nothing called.
"""

import dataclasses
import enum
import functools
import logging
import sys
import threading
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_align.run.rng import generator_state, set_generator_state

_LEAVES = frozenset(
    {*(type(None), bool, int, float, complex, str, bytes), torch.dtype, torch.device}
)
# Code and links, which a run does not change.
_CONSTANT = (
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, types.ModuleType),
    *(functools.partial, weakref.ref, logging.Logger, DataLoader, PurePath),
    *(type(threading.Lock()), type(threading.RLock())),
)
_SEQUENCES = (list, tuple, set, frozenset, deque, torch.Size)
_MAPPINGS: dict[str, Callable[[], Any]] = {
    **{f"{kind.__module__}:{kind.__name__}": kind for kind in (dict, OrderedDict, Counter)},
    **{
        f"defaultdict of {kind.__name__}": functools.partial(defaultdict, kind)
        for kind in (list, dict, int, float, set)
    },
}


class UnknownTypeError(Exception):
    """An object of a class that cannot be built here."""


class LostError(Exception):
    """Something that had no plain form, and is not there today."""


class Encoder:
    """Turns values into plain data; what occurs twice is written once.

    Args:
        links: Name -> object, of those that others save; they become a link.

    Attributes:
        objects: Path -> object, of all that has been encoded and is neither number nor text.
        opaque: Path -> object that has no plain form.
    """

    def __init__(self, links: dict[str, Any]) -> None:
        self.links = links
        self.objects: dict[str, Any] = {}
        self.opaque: dict[str, Any] = {}
        self._names = {id(item): name for name, item in reversed(links.items())}
        self._seen: dict[int, str] = {}

    def encode(self, value: Any, path: str) -> Any:
        """Plain form of a value.

        Args:
            value: An attribute, or a part of one.
            path: Its place, as in ``history[3].loss``.
        """
        if type(value) in _LEAVES:
            return value
        if (name := self._names.get(id(value))) is not None:
            return ("link", name)
        if isinstance(value, _CONSTANT):
            return ("constant", type(value).__name__)
        if (first := self._seen.get(id(value))) is not None:
            return ("seen", first)
        self._seen[id(value)] = path
        self.objects[path] = value
        try:
            return self._structure(value, path)
        except Exception:  # whatever a stranger's object does when it is looked at
            self.opaque[path] = value
            return ("opaque", _name(type(value)))

    def _structure(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return self.plain_tensor(value)
        if isinstance(value, (np.ndarray, np.generic)):
            return self._array(value)
        if isinstance(value, enum.Enum):
            member = value.value if isinstance(value, enum.Flag) else value.name
            return ("enum", _name(type(value)), member)
        if (state := generator_state(value)) is not None:
            return ("generator", _name(type(value)), self.encode(state, f"{path}.state"))
        if isinstance(value, (list, tuple, set, frozenset, deque)):
            return self._sequence(value, path)
        if isinstance(value, dict):
            return self._mapping(value, path)
        if _has_own_state(value):
            return ("state_dict", _name(type(value)), self.encode(value.state_dict(), f"{path}()"))
        fields = _fields(value)
        items = [(name, self.encode(item, f"{path}.{name}")) for name, item in fields.items()]
        return ("object", _name(type(value)), items)

    def plain_tensor(self, value: Tensor) -> Any:
        """Plain form of a tensor, even one that is a link.

        Raises:
            TypeError: If it is of a subclass of torch's, not strided, or without memory.
        """
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
            raise TypeError("no plain tensor")
        if value.is_meta:
            return ("constant", "meta")
        if value.numel() and not value.untyped_storage().nbytes():  # let go, as fully_shard does
            raise TypeError("no values")
        plain = value.detach().resolve_conj().resolve_neg()
        if plain.untyped_storage().nbytes() != plain.nbytes:
            plain = plain.clone()  # or all that it is a view of would be written
        learns = value.is_leaf and value.requires_grad
        return ("tensor", plain, learns, _name(type(value)), plain.device.type == "cpu")

    def _array(self, value: Any) -> Any:
        if value.dtype.kind not in "biufc":
            raise TypeError("no numbers")
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return (kind, torch.from_numpy(np.array(value)))

    def _sequence(self, value: Any, path: str) -> Any:
        _refuse_attributes(value)
        items = [self.encode(item, f"{path}[{number}]") for number, item in enumerate(value)]
        if isinstance(value, (set, frozenset)):
            items.sort(key=repr)  # the order of a set is another one in every process
        return ("sequence", _name(type(value)), items, getattr(value, "maxlen", None))

    def _mapping(self, value: dict[Any, Any], path: str) -> Any:
        _refuse_attributes(value)
        items = [
            (self.encode(key, f"{path}.key{number}"), self.encode(item, f"{path}[{number}]"))
            for number, (key, item) in enumerate(value.items())
        ]
        return ("mapping", _mapping_name(value), items)


class Rebuilder:
    """Puts plain data back, into the objects that are there.

    Args:
        encoder: What has encoded this process's own values.
        owner: Class of the module: only of classes from its files, of dataclasses, named tuples and
            enums new objects are built; of all others there must be one.
        device: Where new tensors go that were on no CPU.
    """

    def __init__(self, encoder: Encoder, owner: type, device: torch.device) -> None:
        self._objects = dict(encoder.objects)
        self._links = encoder.links
        self._files = {base.__module__ for base in owner.__mro__} - {"builtins"}
        self._device = device

    def build(self, today: Any, plain: Any, path: str) -> Any:
        """The value, which is ``today`` itself where that is of its type.

        Args:
            today: What the new process has in its place.
            plain: What an Encoder has made of the saved value.
            path: Its place, as in ``history[3].loss``.

        Raises:
            UnknownTypeError: If an object is of a class that cannot be built here.
            LostError: If something had no plain form, and is not there today.
        """
        if not isinstance(plain, tuple):
            return plain
        match plain:
            case ("link", name) if name in self._links:
                return self._links[name]
            case ("seen", first):
                return self._objects.get(first, today)
            case ("link" | "constant" | "opaque", name):
                if today is None:
                    raise LostError(name)
                return today
            case ("tensor", value, learns, kind, on_cpu):
                built = self._tensor(today, value, learns, kind, on_cpu)
            case ("array", value):
                built = value.numpy().copy()
            case ("scalar", value):
                return value.numpy()[()]
            case ("enum", kind, member):
                return self._enum(self._class(today, kind), member)
            case ("generator" | "sequence" | "mapping" | "state_dict" | "object" as kind, *content):
                built = getattr(self, f"_{kind}")(today, path, *content)
            case _:
                raise UnknownTypeError(str(plain[0]))
        self._objects[path] = built
        return built

    def _tensor(self, today: Any, value: Tensor, learns: bool, kind: str, on_cpu: bool) -> Any:
        fits = _name(type(today)) == kind and today.is_leaf and today.shape == value.shape
        # An optimizer may hold it. Others may be views of what is not to change.
        if fits and (today.requires_grad or isinstance(today, nn.Parameter)):
            today.data.copy_(value)
            return today
        new = value.to("cpu" if on_cpu else self._device, copy=True)
        if kind == _name(nn.Parameter):
            return nn.Parameter(new, learns)
        return new.requires_grad_(learns)

    def _enum(self, kind: Any, member: Any) -> Any:
        if issubclass(kind, enum.Flag):
            return kind(member)
        if member not in kind.__members__:
            raise UnknownTypeError(f"{_name(kind)}.{member}")
        return kind[member]

    def _generator(self, today: Any, path: str, kind: str, state: Any) -> Any:
        if _name(type(today)) != kind:
            raise UnknownTypeError(kind)
        set_generator_state(today, self.build(None, state, f"{path}.state"))
        return today

    def _sequence(
        self, today: Any, path: str, kind: str, items: list[Any], maxlen: int | None
    ) -> Any:
        fits = _name(type(today)) == kind
        old = list(today) if fits and not isinstance(today, (set, frozenset)) else []
        old += [None] * (len(items) - len(old))
        new = [
            self.build(before, item, f"{path}[{number}]")
            for number, (before, item) in enumerate(zip(old, items, strict=False))
        ]
        if fits and isinstance(today, (list, set, deque)):
            today.clear()
            today.update(new) if isinstance(today, set) else today.extend(new)
            return today
        if kind == _name(deque):
            return deque(new, maxlen)
        plain = next((known for known in _SEQUENCES if _name(known) == kind), None)
        return plain(new) if plain else tuple.__new__(self._class(today, kind), new)

    def _mapping(self, today: Any, path: str, kind: str, items: list[Any]) -> Any:
        fits = _mapping_name(today) == kind
        if not fits and kind not in _MAPPINGS:
            raise UnknownTypeError(kind)
        old = dict(today) if fits else {}
        new = {}
        for number, (key, item) in enumerate(items):
            built = self.build(None, key, f"{path}.key{number}")
            new[built] = self.build(old.get(built), item, f"{path}[{number}]")
        result = today if fits else _MAPPINGS[kind]()
        result.clear()
        for key, item in new.items():
            result[key] = item
        return result

    def _state_dict(self, today: Any, path: str, kind: str, state: Any) -> Any:
        if _name(type(today)) != kind:
            raise UnknownTypeError(kind)
        today.load_state_dict(self.build(today.state_dict(), state, f"{path}()"))
        return today

    def _object(self, today: Any, path: str, kind: str, items: list[Any]) -> Any:
        result = today if _name(type(today)) == kind else object.__new__(self._class(None, kind))
        old = _fields(result)
        for name in old.keys() - {name for name, _ in items}:
            object.__delattr__(result, name)
        for name, item in items:
            new = self.build(old.get(name), item, f"{path}.{name}")
            object.__setattr__(result, name, new)
        return result

    def _class(self, today: Any, name: str) -> Any:
        if _name(type(today)) == name:
            return type(today)
        module, _, path = name.partition(":")
        found: Any = sys.modules.get(module)
        for part in path.split("."):
            found = getattr(found, part, None)
        plain = isinstance(found, type) and (
            dataclasses.is_dataclass(found)
            or issubclass(found, enum.Enum)
            or (issubclass(found, tuple) and hasattr(found, "_fields"))
            or found.__module__ in self._files
        )
        if not plain or hasattr(found, "__del__"):
            raise UnknownTypeError(name)
        return found


def _refuse_attributes(value: Any) -> None:
    """Containers are written as what they contain."""
    if getattr(value, "__dict__", None):
        raise TypeError("a container with attributes")


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _mapping_name(value: Any) -> str:
    if type(value) is defaultdict:
        return f"defaultdict of {getattr(value.default_factory, '__name__', None)}"
    return _name(type(value))


def _has_own_state(value: Any) -> bool:
    names = ("state_dict", "load_state_dict")
    return not isinstance(value, nn.Module) and all(
        callable(getattr(type(value), name, None)) for name in names
    )


def _fields(value: Any) -> dict[str, Any]:
    """Attributes of an object that is nothing but its attributes.

    Raises:
        TypeError: If it is more than that: of C code, or pickled in a way of its own.
    """
    kind = type(value)
    ours = ("__reduce__", "__reduce_ex__", "__getstate__")
    is_plain = all(getattr(kind, name, None) is getattr(object, name, None) for name in ours)
    standard = kind.__module__.partition(".")[0] in sys.stdlib_module_names
    if standard and kind is not types.SimpleNamespace and kind.__module__ != "__main__":
        raise TypeError("of the standard library")
    if not (is_plain or isinstance(value, (nn.Module, types.SimpleNamespace))):
        raise TypeError("has its own way of being pickled")
    slots = [name for base in kind.__mro__ for name in vars(base).get("__slots__", ())]
    if not hasattr(value, "__dict__") and not slots:
        raise TypeError("has no attributes")
    if isinstance(value, (int, float, complex, str, bytes, list, tuple, dict, set, frozenset)):
        raise TypeError("is more than its attributes")
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return held | vars(value) if hasattr(value, "__dict__") else held
