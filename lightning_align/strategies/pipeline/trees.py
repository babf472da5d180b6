"""What layers return: a tensor, or tensors in tuples, lists and dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


class Meta(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def like(self) -> Tensor:
        """A tensor without memory; one of floats always carries a gradient, frozen or not."""
        grad = self.dtype.is_floating_point
        return torch.empty(self.shape, dtype=self.dtype, device="meta", requires_grad=grad)


class Unknown(NamedTuple):
    """Something else than tensors, numbers and words, of which only the class is told."""

    kind: str


def leaves(tree: Any) -> Iterator[Any]:
    """What is in it, in order, whatever it is."""
    if isinstance(tree, (Meta, Unknown)):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for entry in tree:
            yield from leaves(entry)
    elif isinstance(tree, Mapping):
        for entry in tree.values():
            yield from leaves(entry)
    else:
        yield tree


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in it, in order."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def metas_of(tree: Any) -> Any:
    """The same tree with a ``Meta`` for each tensor."""

    def plain(leaf: Any) -> Any:
        known = leaf is None or isinstance(leaf, (Meta, bool, int, float, str))
        return leaf if known else Unknown(type(leaf).__name__)

    metas = apply_to_collection(tree, Tensor, lambda t: Meta(tuple(t.shape), t.dtype))
    return mapped(metas, plain)


def filled(metas: Any, make: Callable[[Meta], Tensor]) -> Any:
    """The tree of ``metas_of`` with tensors again, made in their order."""
    return mapped(metas, lambda leaf: make(leaf) if isinstance(leaf, Meta) else leaf)


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same tree with ``change`` of each leaf."""
    kind: Any = type(tree)
    if isinstance(tree, (Meta, Unknown)):
        return change(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return kind(*(mapped(entry, change) for entry in tree))
    if isinstance(tree, (tuple, list)):
        return kind(mapped(entry, change) for entry in tree)
    if isinstance(tree, Mapping):
        return kind({key: mapped(entry, change) for key, entry in tree.items()})
    return change(tree)


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place; an inference tensor does not count."""
    return 0 if tensor.is_inference() else tensor._version
