"""A step that is run to find something out leaves the module as it was."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, MutableMapping, MutableSet
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Around what must not change the attributes and buffers of a module or of its parts.

    Numbers, words, tensors, and lists, dicts and sets of them are put back; those containers stay
    the objects they are. What an object of another class keeps inside is not seen.
    """
    before = [(vars(part), dict(vars(part))) for part in module.modules()]
    contents = [
        (value, _content(value)) for _, attributes in before for value in attributes.values()
    ]
    tensors = [
        (tensor, tensor.detach().clone())
        for value, content in contents
        for tensor in _tensors(value, content)
    ]
    try:
        yield
    finally:
        for attributes, were in before:
            attributes.clear()
            attributes.update(were)
        for value, content in contents:
            if content is not None:
                value.clear()
                (value.update if hasattr(value, "update") else value.extend)(content)
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)


def _content(value: Any) -> Any:
    """A copy of what a container holds, None for anything else."""
    if isinstance(value, MutableMapping):
        return dict(value)
    if isinstance(value, MutableSet):
        return set(value)
    return list(value) if isinstance(value, (list, deque)) else None


def _tensors(value: Any, content: Any) -> list[Tensor]:
    """Those with values that may be changed in place."""
    entries = (
        content.values() if isinstance(content, dict) else [value] if content is None else content
    )
    return [
        entry
        for entry in entries
        if isinstance(entry, Tensor) and not isinstance(entry, nn.Parameter) and not entry.is_meta
    ]
