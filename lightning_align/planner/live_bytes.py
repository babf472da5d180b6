"""Live bytes: how much memory tensors take at a time, each storage once, and the most there was.

``Storages`` follows every storage from the operation that makes it to the moment it is freed.
``LiveBytes`` counts by kind what a step must hold: weights, gradients, optimizer state, and what
autograd saves for backward. Neither needs values: tensors on meta have storages, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_align._compat.torch_modules import storage_key


class _Followed(weakref.ref[Any]):
    """A storage until it is gone, and what is to be known of it then."""

    __slots__ = ("key", "size")
    key: int
    size: int


class Storages:
    """Every storage that was seen, numbered in that order, and the bytes of those that live.

    Attributes:
        now: Bytes of those that live.
        peak: The most there ever were.
        sizes: Bytes of each, also of those that are gone.
        there: Numbers of those that nothing made since this began.
        numbers: ``storage_key`` -> number, of those that are followed.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.sizes: list[int] = []
        self.there: set[int] = set()
        self.numbers: dict[int, int] = {}
        self._followed: dict[int, _Followed] = {}
        self._changing: set[int] = set()  # keys of those whose memory comes and goes
        self._when_gone: Any = self._gone  # which would be made anew for each; until ``close``

    def number(self, tensor: Tensor, *, was_there: bool = False) -> int:
        """Number of the tensor's storage, which is followed from now on; -1 if it has none.

        Args:
            tensor: Any tensor.
            was_there: Whether a storage that is new here has lived from the beginning.
        """
        key = storage_key(tensor)
        if key is None:
            return -1
        known = self.numbers.get(key)
        return self.follow(tensor.untyped_storage(), was_there) if known is None else known

    def follow(self, storage: Any, was_there: bool) -> int:
        """Number of a storage that is new here.

        Args:
            storage: Of a tensor.
            was_there: Whether it has lived from the beginning.
        """
        key, size, number = storage._cdata, storage.nbytes(), len(self.sizes)
        self.sizes.append(size)
        self.numbers[key] = number
        self._followed[key] = followed = _Followed(storage, self._when_gone)
        followed.key, followed.size = key, size
        self.now += size
        if was_there:  # what has always lived did so at the peak, too
            self.there.add(number)
            self.peak += size
        elif self.now > self.peak:
            self.peak = self.now
        return number

    def follow_size(self, tensor: Tensor) -> None:
        """Follow a storage whose memory is taken and given back while it lives.

        So FSDP keeps the parameters of a block. They count among those that were there.
        """
        self.look()
        key = storage_key(tensor)
        if key is None or key in self._changing:
            return
        if key not in self.numbers:
            self.follow(tensor.untyped_storage(), was_there=False)
        self.there.add(self.numbers[key])
        self._changing.add(key)

    def look(self) -> None:
        """See how large those are now whose memory comes and goes."""
        for key in self._changing:
            followed = self._followed[key]
            if (storage := followed()) is not None:
                size = storage.nbytes()
                self.now += size - followed.size
                followed.size = size
        self.peak = max(self.peak, self.now)

    def _gone(self, followed: _Followed) -> None:
        self.now -= followed.size
        self._changing.discard(followed.key)
        del self.numbers[followed.key], self._followed[followed.key]

    def close(self) -> None:
        """Follow nothing any longer."""
        self._followed.clear()
        self.numbers.clear()
        self._changing.clear()
        self._when_gone = None


class Held:
    """Bytes of the storages that somebody holds, each once however many do."""

    def __init__(self) -> None:
        self.bytes = self.peak = 0
        self._holders: dict[int, list[int]] = {}  # storage -> [bytes, how many hold it]

    def hold(self, tensor: Tensor) -> None:
        """Count the tensor's storage."""
        key = storage_key(tensor)
        if key is not None:
            entry = self._holders.setdefault(key, [tensor.untyped_storage().nbytes(), 0])
            entry[1] += 1
            self.bytes += entry[0] if entry[1] == 1 else 0
            self.peak = max(self.peak, self.bytes)

    def release(self, tensor: Tensor) -> None:
        """Undo one ``hold``."""
        key = storage_key(tensor)
        if key is not None:
            entry = self._holders[key]
            entry[1] -= 1
            if not entry[1]:
                self.bytes -= self._holders.pop(key)[0]


class Saved:
    """What autograd holds in place of a tensor: counted as long as it lives."""

    def __init__(self, held: Held, tensor: Tensor) -> None:
        self.held, self.tensor = held, tensor
        held.hold(tensor)

    def __del__(self) -> None:
        self.held.release(self.tensor)


class LiveBytes:
    """Weights, gradients, optimizer state and what autograd saves, at the worst moment of steps.

    Temporary tensors of the optimizer and inside of operations are not in it.

    Args:
        model: Whose parameters are trained.

    Attributes:
        weights: Bytes of the parameters.
        optimizer: Bytes of the optimizer's state when it was last looked at.
        peak: The most of all kinds at once.
        saved_peak: The most that autograd held.
        gradient_peak: The most of gradients.
        optimizer_peak: The most of the optimizer's state.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = sum(parameter.nbytes for parameter in model.parameters())
        self.optimizer = self.peak = self.gradient_peak = self.optimizer_peak = 0
        self.saved = Held()
        self._own = {storage_key(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _: self.look())  # type: ignore[no-untyped-call]

    @property
    def saved_peak(self) -> int:
        """The most that autograd held."""
        return self.saved.peak

    @contextmanager
    def saving(self, inputs: Iterable[Tensor] = ()) -> Iterator[None]:
        """Context of a forward: what is saved in it counts, less the model's own and ``inputs``."""
        self._own |= {storage_key(tensor) for tensor in inputs}
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield
        self.look()

    def _pack(self, tensor: Tensor) -> Tensor | Saved:
        if storage_key(tensor) in self._own:
            return tensor
        saved = Saved(self.saved, tensor)
        self._total()
        return saved

    def look(self, optimizer: Optimizer | None = None) -> None:
        """Follow gradients, and the state of ``optimizer``, that came and went."""
        self.gradient_peak = max(self.gradient_peak, self._gradients())
        if optimizer is not None:
            states = [value for state in optimizer.state.values() for value in state.values()]
            self.optimizer = sum(value.nbytes for value in states if isinstance(value, Tensor))
            self.optimizer_peak = max(self.optimizer_peak, self.optimizer)
        self._total()

    def _gradients(self) -> int:
        return sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)

    def _total(self) -> None:
        held = self.weights + self.optimizer + self._gradients() + self.saved.bytes
        self.peak = max(self.peak, held)


def _unpack(held: Tensor | Saved) -> Tensor:
    return held.tensor if isinstance(held, Saved) else held
