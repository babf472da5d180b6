"""What the user's step changes in the module: its attributes, before and after.

A step may count, collect predictions, or update metric objects. Those are looked for in the module
and in what it holds, apart from the layers of the chain, which belong to their stages. Each
micro-batch begins with the attributes that the batch began with, so that what they come to can be
joined (joining.py) to what one process has.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, MutableMapping, Sequence, Set
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from lightning_align._errors import argument_error
from lightning_align.run.rng import generator_state, set_generator_state
from lightning_align.strategies.pipeline.trees import version_of

WHERE = "PipelineStrategy"
_OF_ANY_MODULE = {*vars(pl.LightningModule()), *vars(nn.Module())}
# Objects of these packages keep to themselves what they change, or are no state of a step.
_FOREIGN = {
    *("torch", "lightning", "pytorch_lightning", "lightning_fabric", "transformers", "tokenizers"),
    *("logging", "threading", "functools", "builtins", "numpy", "wandb", "tensorboard", "datasets"),
}
_CODE = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)
_CLONED_NUMEL = 2**22  # larger tensors are no counters: a copy of them for each batch takes long
_LONG = 16  # the entries of a list or dict this long are not changed where they are


class _Copy:
    """A value as it was, and the way back to it."""

    __slots__ = ("inner", "value", "version")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.inner: Any = None
        self.version = 0
        if isinstance(value, Tensor):
            self.version = version_of(value)
            if value.numel() <= _CLONED_NUMEL and not value.is_meta:
                self.inner = value.detach().clone()
        elif isinstance(value, np.ndarray):
            self.inner = value.copy()
        elif isinstance(value, (list, deque)):
            self.inner = list(value) if len(value) > _LONG else [_Copy(v) for v in value]
        elif isinstance(value, dict):
            is_long = len(value) > _LONG
            self.inner = {k: v if is_long and _is_tensor(v) else _Copy(v) for k, v in value.items()}
        elif isinstance(value, set):
            self.inner = set(value)

    def is_changed(self, now: Any) -> bool:
        """Whether the value is another one now."""
        value, inner = self.value, self.inner
        if isinstance(value, Tensor):
            if now is not value or (not value.is_inference() and value._version == self.version):
                return now is not value
            # An inference tensor counts no versions; another one may have been put back.
            return inner is not None and not _alike(value, inner)
        if isinstance(value, np.ndarray):
            return now is not value or not np.array_equal(value, inner, equal_nan=_is_float(value))
        if isinstance(value, (list, deque)):
            if now is not value or len(value) != len(inner):
                return True
            return any(_differs(a, b) for a, b in zip(inner, value, strict=True))
        if isinstance(value, dict):
            if now is not value or value.keys() != inner.keys():
                return True
            return any(_differs(entry, value[key]) for key, entry in inner.items())
        if isinstance(value, set):
            return now is not value or value != inner
        return now is not value and not (type(now) is type(value) and _same(now, value))

    @property
    def is_lost(self) -> bool:
        """Whether it was changed where it is, and was too large to be kept."""
        value = self.value
        is_large = isinstance(value, Tensor) and self.inner is None and not value.is_meta
        return is_large and version_of(value) != self.version

    def kept(self) -> Any:
        """The value before; the same object where it has not changed."""
        value, inner = self.value, self.inner
        if inner is None or not self.is_changed(value):
            return value
        if isinstance(value, (list, deque)):
            return [entry.kept() if isinstance(entry, _Copy) else entry for entry in inner]
        if isinstance(value, dict):
            return {k: v.kept() if isinstance(v, _Copy) else v for k, v in inner.items()}
        return inner

    def back(self) -> Any:
        """The same object with what it held."""
        value, inner = self.value, self.inner
        if isinstance(value, Tensor):
            if inner is not None and not _alike(value, inner):
                with torch.no_grad():
                    value.copy_(inner)
                self.version = version_of(value)
        elif isinstance(value, np.ndarray):
            value[...] = inner
        elif isinstance(value, (list, deque)):
            _refill(value, [v.back() if isinstance(v, _Copy) else v for v in inner])
        elif isinstance(value, dict):
            _refill(value, {k: v.back() if isinstance(v, _Copy) else v for k, v in inner.items()})
        elif isinstance(value, set):
            _refill(value, inner)
        return value


def _refill(container: Any, content: Any) -> Any:
    """The same list, deque, dict or set, with other entries."""
    container.clear()
    add = container.extend if isinstance(container, (list, deque)) else container.update
    add(content)
    return container


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    same = ours == theirs
    return bool((same | (ours.isnan() & theirs.isnan())).all())


def _differs(copy: Any, now: Any) -> bool:
    return copy.is_changed(now) if isinstance(copy, _Copy) else copy is not now


def _same(now: Any, before: Any) -> bool:
    try:
        return bool(now == before)
    except (TypeError, ValueError, RuntimeError):
        return False


def _is_float(array: np.ndarray[Any, Any]) -> bool:
    return array.dtype.kind in "fc"


Slot = tuple[MutableMapping[str, Any], str]
Taken = dict[str, tuple[Slot, _Copy]]


class StepAttributes:
    """The attributes of a module that its steps may change.

    Args:
        module: The user's module.
        layers: Modules that are not looked into, with all that they hold.
    """

    def __init__(self, module: pl.LightningModule, layers: Sequence[nn.Module] = ()) -> None:
        self.module = module
        self._left_out = {id(part) for layer in layers for part in layer.modules()}
        self._parts: list[tuple[str, nn.Module]] = []
        self._children: list[nn.Module] = []

    def slots(self) -> dict[str, Slot]:
        """For each path, (where the attribute is kept, under which name)."""
        found: dict[str, Slot] = {}
        seen: set[int] = set()
        children = [child for child in self.module._modules.values() if child is not None]
        if not self._parts or children != self._children:
            named = self.module.named_modules()
            self._parts = [(n, part) for n, part in named if id(part) not in self._left_out]
            self._children = children
        for name, part in self._parts:
            prefix = f"{name}." if name else ""
            for key in part._buffers:
                found[f"{prefix}{key}"] = (part._buffers, key)
            found.update(_attributes(part, prefix, seen))
        return found

    def take(self) -> Taken:
        """Everything as it is."""
        return {path: (slot, _Copy(slot[0][slot[1]])) for path, slot in self.slots().items()}

    def changed(self, taken: Taken) -> dict[str, tuple[Any, Any]]:
        """For each path, copies of (value before, value now), of what is another since.

        Raises:
            ValueError: If a tensor was changed where it is that is too large to be kept.
        """
        found: dict[str, tuple[Any, Any]] = {}
        for path, (mapping, key) in self.slots().items():
            if path not in taken:
                found[path] = (None, frozen(mapping[key], None))
                continue
            copy = taken[path][1]
            if not copy.is_changed(mapping[key]) and not copy.is_lost:
                continue
            if copy.is_lost:
                name = type(self.module).__name__
                rule = f"its steps change {path!r} where it is, and it is too large to be kept"
                way_out = "Assign a new tensor, or change it in on_train_batch_end"
                raise argument_error(WHERE, "model", name, rule, way_out)
            found[path] = (copy.kept(), frozen(mapping[key], copy))
        return found

    def restore(self, taken: Taken, *, by_value: bool = False) -> None:
        """Everything as it was; what has come since is gone.

        Args:
            taken: How it was.
            by_value: Whether tensors are compared, too, that count no change: batch norm writes its
                statistics so. Not between a forward and its backward, which may have saved them.
        """
        for path, (mapping, key) in self.slots().items():
            if path not in taken:
                del mapping[key]
        for (mapping, key), copy in taken.values():
            if by_value or key not in mapping or copy.is_changed(mapping[key]):
                mapping[key] = copy.back()

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Around what must leave no trace in them, nor in generators that the module has."""
        taken = self.take()
        owned = [value for part in self.module.modules() for value in vars(part).values()]
        generators = [(v, state) for v in owned if (state := generator_state(v)) is not None]
        try:
            yield
        finally:
            self.restore(taken, by_value=True)
            for generator, state in generators:
                set_generator_state(generator, state)

    def assign(self, path: str, value: Any) -> None:
        """Give an attribute the value that the batch came to, where it is if it is a container."""
        owner_path, _, key = path.rpartition(".")
        owner: Any = attrgetter(owner_path)(self.module) if owner_path else self.module
        is_buffer = isinstance(owner, nn.Module) and key in owner._buffers
        mapping = owner._buffers if is_buffer else vars(owner)
        mapping[key] = _put(mapping.get(key), value, is_buffer=is_buffer)


def _attributes(
    owner: Any, prefix: str, seen: set[int], depth: int = 0
) -> Iterator[tuple[str, tuple[dict[str, Any], str]]]:
    base = _OF_ANY_MODULE if isinstance(owner, nn.Module) else set()
    # What its models note of themselves, such as that they have hooks, is no state of a step.
    of_library = any(kind.__module__.startswith("transformers.") for kind in type(owner).__mro__)
    for key, value in list(vars(owner).items()):
        if key in base or key.startswith("_hparams") or isinstance(value, _CODE):
            continue
        if of_library and key.startswith("_"):
            continue
        if isinstance(value, nn.Module) or (callable(value) and not hasattr(value, "__dict__")):
            continue
        if _is_data(value):
            yield f"{prefix}{key}", (vars(owner), key)
        elif _is_looked_into(value) and id(value) not in seen and depth < 3:
            seen.add(id(value))
            yield from _attributes(value, f"{prefix}{key}.", seen, depth + 1)


def _is_data(value: Any, depth: int = 0) -> bool:
    """Whether it is made of numbers, texts and tensors, as far as a first entry tells."""
    if isinstance(value, nn.Parameter):
        return False
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Tensor)):
        return True
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    if isinstance(value, np.generic):
        return True
    if depth > 3:
        return False
    if isinstance(value, dict):
        return all(_is_data(entry, depth + 1) for entry in [*value.values()][:8])
    if isinstance(value, (list, tuple, deque, Set)):
        return all(_is_data(entry, depth + 1) for entry in [*value][:8])
    return False


def _is_looked_into(value: Any) -> bool:
    package = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and package not in _FOREIGN


def frozen(value: Any, copy: Any) -> Any:
    """A value that a later micro-batch does not change, cut off from the graph.

    Args:
        value: The value now.
        copy: What was taken of it before, or None.
    """
    if isinstance(copy, _Copy) and not copy.is_changed(value):
        return value  # the same object still, which tells what a list had before
    inner = copy.inner if isinstance(copy, _Copy) and copy.value is value else None
    if isinstance(value, Tensor):
        return value.detach() if inner is None else value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, (list, deque)):
        known = list(inner or [])
        # A deque of bounded length has dropped its first entries.
        shift = 0 if isinstance(value, list) else _dropped(known, value)
        old = [*known[shift:], *[None] * len(value)]
        entries = [v if v is o else frozen(v, o) for v, o in zip(value, old, strict=False)]
        return deque(entries, value.maxlen) if isinstance(value, deque) else entries
    if isinstance(value, dict):
        return {key: frozen(entry, (inner or {}).get(key)) for key, entry in value.items()}
    if isinstance(value, tuple):
        entries = [frozen(entry, None) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return set(value) if isinstance(value, set) else value


def _dropped(known: list[Any], now: deque[Any]) -> int:
    first = now[0] if now else None
    values = [entry.value if isinstance(entry, _Copy) else entry for entry in known]
    return next((i for i, value in enumerate(values) if value is first), len(values))


def _put(old: Any, value: Any, *, is_buffer: bool = False) -> Any:
    """``value``, in the object that was there where it is a container or a buffer."""
    both = isinstance(old, Tensor) and isinstance(value, Tensor)
    if is_buffer and both and (old.shape, old.dtype) == (value.shape, value.dtype):
        with torch.no_grad():
            return old.copy_(value)
    if isinstance(old, (list, deque)) and isinstance(value, (list, deque)):
        return _refill(old, value)
    if isinstance(old, dict) and isinstance(value, dict):
        for key in [key for key in old if key not in value]:
            del old[key]
        for key, entry in value.items():
            old[key] = _put(old.get(key), entry)
        return old
    if isinstance(old, set) and isinstance(value, set):
        return _refill(old, value)
    return value
