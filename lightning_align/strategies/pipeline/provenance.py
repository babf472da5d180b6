"""Follows what a step computes outside of its layers from outputs other than the last one.

On another rank such an output is a stand-in, so a loss, a mask or a number that comes from it would
be wrong there without a word. Memory is marked, which views and changes in place share, and what an
operation makes of marked memory is marked in turn. Only at set-up: it costs a call of Python for
every operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_align._compat.torch_modules import storage_key
from lightning_align.strategies.pipeline.trees import tensors_in

# What does not depend on the values of the tensor that it is given.
_OF_SHAPE_ONLY = (
    *("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like"),
    *("zeros_like", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros"),
)
_READ_VALUES = ("_local_scalar_dense", "equal", "is_nonzero")


class Provenance(TorchDispatchMode):
    """Marks memory, and what is computed from it.

    Args:
        refuse: Called with where a value comes from that Python asks for.
    """

    def __init__(self, refuse: Callable[[str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._refuse = refuse
        self._is_paused = False
        self._marks: dict[int, tuple[Any, str]] = {}  # with the memory, lest its key is used again

    def mark(self, tree: Any, origin: str) -> None:
        """Mark the memory of tensors, with where they come from in words."""
        for tensor in tensors_in(tree):
            if (key := storage_key(tensor)) is not None:
                self._marks[key] = (tensor.untyped_storage(), origin)

    def clear(self, tree: Any) -> None:
        """Forget the marks of tensors."""
        for tensor in tensors_in(tree):
            self._marks.pop(storage_key(tensor) or 0, None)

    def of(self, tree: Any) -> str | None:
        """Where the first marked one of these tensors comes from."""
        for tensor in tensors_in(tree):
            if (mark := self._marks.get(storage_key(tensor) or 0)) is not None:
                return mark[1]
        return None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not the step's own."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        origin = None if self._is_paused else self.of((args, kwargs))
        if origin is not None and name in _READ_VALUES:
            self._refuse(origin)
        result = func(*args, **kwargs)
        if origin is not None and name not in _OF_SHAPE_ONLY:
            self.mark(result, origin)
        return result
