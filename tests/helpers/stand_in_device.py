"""A device that a CPU stands in for: copies come as late as events let them, and places are told.

``DelayedCopies`` are what ``lightning_align.offload.device.Copies`` are, between two parts of a
CPU's memory. A copy is made when something waits for its event, and until then its target is NaN:
whoever reads it without waiting computes NaN. What is copied from must be as it was, and not freed,
until the host knows that the copy is done; this is looked at again and again.

``TwoPlaces`` knows which tensors are on which side, and refuses operations on both, as CUDA does.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lightning_align.offload.buffers import BufferPool
from lightning_align.strategies.zero_infinity import on_device

CPU = torch.device("cpu")
_ASKED = 3  # times that an event is asked for before it is done


def _bytes(tensor):
    return tensor.detach().clone().reshape(-1).view(torch.uint8)


class _Source:
    """What is copied from, without holding it."""

    def __init__(self, tensor):
        self._weak, self._values = StorageWeakRef(tensor.untyped_storage()), _bytes(tensor)
        self._dtype = tensor.dtype
        self._where = tensor.storage_offset(), tensor.shape, tensor.stride()

    def check(self):
        assert not self._weak.expired(), "memory was given back while it was being copied"
        storage = torch.UntypedStorage._new_with_weak_ptr(self._weak.cdata)
        now = torch.empty(0, dtype=self._dtype).set_(storage, *self._where)
        assert torch.equal(_bytes(now), self._values), "memory was changed while it was copied"


class _Event:
    def __init__(self, copies, source=None, target=None):
        self._copies, self._held, self._asked = copies, (source, target), 0
        self._is_copied = source is None
        self._source = None if source is None else _Source(source)
        if source is not None:
            copies.open[id(self._source)] = self._source
            with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
                target.view(-1).view(torch.uint8).fill_(255)

    def _copy(self):
        if not self._is_copied:
            self._is_copied = True
            source, target = self._held
            with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
                self._source.check()
                target.copy_(source)

    @property
    def is_done(self):
        self._asked += 1
        if self._asked >= _ASKED:
            self.wait()
        return self._asked >= _ASKED

    def wait(self):
        self._copies.check()
        self._copy()
        self._copies.open.pop(id(self._source), None)
        self._held, self._asked = None, _ASKED

    def compute_waits(self):
        self._copies.check()
        self._copy()


class DelayedCopies:
    """To and from a part of the CPU's memory that stands in for a device.

    Attributes:
        there: Bytes that were copied to it.
        back: Bytes that came back.
        bytes_there: What is on it now.
        most_there: The most of ``bytes_there``.
    """

    device = CPU

    def __init__(self):
        self.open, self._blocks = {}, []
        self.there = self.back = self.most_there = 0
        self.places = TwoPlaces()

    def check(self):
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            for source in self.open.values():
                source.check()

    def to_device(self, host, into=None):
        self.check()
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            target = torch.empty(host.shape, dtype=host.dtype) if into is None else into
        self.there += host.nbytes
        self.places.put(target, "device")
        if into is None:
            self._blocks.append((StorageWeakRef(target.untyped_storage()), host.nbytes))
        self.most_there = max(self.most_there, self.bytes_there)
        return target, _Event(self, host, target)

    def to_host(self, there, host):
        self.check()
        self.back += host.nbytes
        assert self.places.of(there) != "host", "this is in host memory already"
        self.places.put(host, "host")
        return _Event(self, there, host)

    def mark(self):
        self.check()
        return _Event(self)

    @property
    def bytes_there(self):
        self._blocks = [(weak, n) for weak, n in self._blocks if not weak.expired()]
        return sum(nbytes for _, nbytes in self._blocks)


class TwoPlaces(TorchDispatchMode):
    """Knows of tensors whether they are in host memory or on the device; of many neither."""

    def __init__(self):
        super().__init__()
        self._places = {}  # identity of a storage -> its end, and where it is

    def put(self, tensor, place):
        storage = tensor.untyped_storage()
        self._places[storage._cdata] = StorageWeakRef(storage), place

    def of(self, tensor):
        weak, place = self._places.get(tensor.untyped_storage()._cdata, (None, None))
        return None if weak is None or weak.expired() else place

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
        places = {self.of(tensor) for tensor in given} - {None}
        copies = func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.set_)
        assert copies or len(places) < 2, f"{func} of tensors in host memory and on the device"
        result = func(*args, **(kwargs or {}))
        if len(places) == 1:
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.dim() and self.of(tensor) is None:
                    self.put(tensor, *places)
        return result


@contextmanager
def stand_in_device(monkeypatch):
    """Strategies compute on a stand-in; yields its copies, of which none is open at the end."""
    copies, take = DelayedCopies(), BufferPool.take

    def take_here(pool, nbytes):
        memory = take(pool, nbytes)
        copies.places.put(memory, "host")
        return memory

    monkeypatch.setattr(on_device, "copies_for", lambda *_, **__: copies)
    monkeypatch.setattr(BufferPool, "take", take_here)
    with ExitStack() as stack:
        stack.enter_context(copies.places)
        yield copies
    copies.check()
