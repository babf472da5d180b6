"""Attributes of an instance, replaced for a while, and modules that evaluate for a while.

An attribute in the instance keeps the class, the hooks and the module tree as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object an attribute of its own for a while, in place of its class's."""
    attributes = vars(owner)
    before = {key: attributes[key] for key in (name,) if key in attributes}
    attributes[name] = value
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(before)


@contextmanager
def identity(module: nn.Module) -> Iterator[list[Tensor]]:
    """Make ``module`` the identity for a while; yields the list of what it is called on."""
    inputs: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        inputs.append(hidden)
        return hidden

    with replaced(module, "forward", forward):
        yield inputs


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards each part in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
