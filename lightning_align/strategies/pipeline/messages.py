"""Plain data with tensors in it as one row of bytes, and a form that says what they mean.

The form of a message seldom changes from step to step: it is sent once, and then the bytes alone.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class _TensorForm(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_numpy: bool


class _Number(NamedTuple):
    kind: type


class _Table(NamedTuple):
    kind: Any
    entries: tuple[tuple[Any, Any], ...]


class _Row(NamedTuple):
    kind: Any
    entries: tuple[Any, ...]


class _Literal:
    """Anything else, as it is; equal to another of its type and value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Literal) or type(self.value) is not type(other.value):
            return False
        try:
            return bool(self.value == other.value)
        except (TypeError, ValueError, RuntimeError):
            return False


class Packed(NamedTuple):
    """A message: its form, and its bytes."""

    form: Any
    data: Tensor


def packed(value: Any, device: torch.device) -> Packed:
    """Plain data as a message on a device."""
    tensors: list[Tensor] = []
    form = _form(value, tensors)
    rows = [tensor.to(device).contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    empty = torch.zeros(0, dtype=torch.uint8, device=device)
    return Packed(form, torch.cat([empty, *rows]))


def _form(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return _TensorForm(tuple(value.shape), value.dtype, False)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        tensors.append(torch.from_numpy(np.ascontiguousarray(value)))
        return _TensorForm(value.shape, tensors[-1].dtype, True)
    if type(value) is float or (type(value) is int and abs(value) < 2**63):
        dtype = torch.float64 if type(value) is float else torch.int64
        tensors.append(torch.tensor(value, dtype=dtype))
        return _Number(type(value))
    if isinstance(value, dict):
        entries = [(key, _form(entry, tensors)) for key, entry in value.items()]
        return _Table(type(value), tuple(entries))
    if isinstance(value, (list, tuple, deque)):
        kind: Any = type(value)
        if isinstance(value, deque):
            kind = (deque, value.maxlen)
        return _Row(kind, tuple(_form(entry, tensors) for entry in value))
    return _Literal(value)


def length_of(form: Any) -> int:
    """Bytes of a message of this form."""
    if isinstance(form, _TensorForm):
        return math.prod(form.shape) * form.dtype.itemsize
    if isinstance(form, _Number):
        return 8
    if isinstance(form, _Table):
        return sum(length_of(entry) for _, entry in form.entries)
    return sum(length_of(entry) for entry in form.entries) if isinstance(form, _Row) else 0


def unpacked(form: Any, data: Tensor) -> Any:
    """The data of a message."""
    begin = 0

    def take(length: int, dtype: torch.dtype) -> Tensor:
        nonlocal begin
        begin += length
        return data[begin - length : begin].clone().view(dtype)  # from a place that fits the type

    def read(form: Any) -> Any:
        if isinstance(form, _TensorForm):
            value = take(length_of(form), form.dtype).reshape(form.shape)
            return value.cpu().numpy() if form.is_numpy else value
        if isinstance(form, _Number):
            return take(8, torch.float64 if form.kind is float else torch.int64).item()
        if isinstance(form, _Table):
            table = {key: read(entry) for key, entry in form.entries}
            return table if form.kind is dict else _remade(form.kind, table)
        if isinstance(form, _Row):
            entries = [read(entry) for entry in form.entries]
            if isinstance(form.kind, tuple):
                return deque(entries, form.kind[1])
            if hasattr(form.kind, "_fields"):
                return form.kind(*entries)
            return form.kind(entries)
        return form.value

    return read(form)


def _remade(kind: Any, table: dict[Any, Any]) -> Any:
    """A subclass of dict that is made of a dict, or the dict where it is not."""
    try:
        return kind(table)
    except (TypeError, ValueError):
        return table
