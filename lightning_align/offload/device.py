"""A device that computes and is not the host: what is copied there and back, and in which order.

Blocks, their sums of gradients and the optimizer's state live in host memory, and on a drive behind
it; the optimizer steps there, as DeepSpeed's CPU Adam does. The device holds copies of the blocks
that compute, and gives gradients back. On a CPU there is no such device, and nothing is copied.

Three streams run beside each other, and the host runs ahead of all of them::

    in       B1 B2 .. B3 .. B4 ..        a block's values, from its buffer to the device
    compute     1  .. 2  .. 3  ..        waits for its copy; memory is reused when it is past it
    out            G1 .. G2 .. G3        gradients, to buffers that the host reads when they came

Who reads or fills host memory that a copy is made from, or to, waits for the copy's ``Event``.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

_Stream: Any = torch.cuda.Stream  # torch leaves these without types


class Event(Protocol):
    """The end of a copy, or of what computes now."""

    @property
    def is_done(self) -> bool:
        """Whether the host may go on without waiting."""
        ...

    def wait(self) -> None:
        """Let the host wait."""
        ...

    def compute_waits(self) -> None:
        """Let what is computed from now on wait, and the host go on."""
        ...


class Copies(Protocol):
    """Copies between host memory and a device.

    Attributes:
        device: Which one.
    """

    device: torch.device

    def to_device(self, host: Tensor, into: Tensor | None = None) -> tuple[Tensor, Event]:
        """Begin a copy to the device.

        Args:
            host: What to copy; it must stay as it is until the event.
            into: Where to, once what has been computed so far is done with it; None takes new
                memory.
        """
        ...

    def to_host(self, there: Tensor, host: Tensor) -> Event:
        """Begin a copy to the host, of what has been computed so far.

        Args:
            there: What to copy; the event holds it.
            host: Where to; it must not be read or written until the event.
        """
        ...

    def mark(self) -> Event:
        """What has been computed so far, as something to wait for."""
        ...


def copies_for(device: torch.device, *, pinned: bool) -> Copies | None:
    """What copies to a device; None where that is the host.

    Args:
        device: Where modules compute.
        pinned: Whether host memory is registered with it, so that copies need not wait.
    """
    return None if device.type == "cpu" else CudaCopies(device, pinned=pinned)


class _CudaEvent:
    """An event of a stream, and what must not be freed before it."""

    def __init__(self, device: torch.device, event: Any, *held: Tensor) -> None:
        self._device, self._event, self._held = device, event, held

    @property
    def is_done(self) -> bool:
        done: bool = self._event.query()
        return done

    def wait(self) -> None:
        self._event.synchronize()
        self._held = ()

    def compute_waits(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaCopies:
    """Copies by two streams beside the one that computes.

    Args:
        device: A CUDA device.
        pinned: Whether host memory is registered with it, so that copies need not wait.
    """

    def __init__(self, device: torch.device, *, pinned: bool) -> None:
        self.device = device
        self._in, self._out = _Stream(device), _Stream(device)
        self._pinned = pinned

    def to_device(self, host: Tensor, into: Tensor | None = None) -> tuple[Tensor, Event]:
        """Begin a copy to the device."""
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._in):
            if into is None:
                there = torch.empty(host.shape, dtype=host.dtype, device=self.device)
                # It is the copying stream's: when its last view is gone, compute is waited for.
                there.record_stream(compute)
            else:
                there = into
                self._in.wait_stream(compute)
            there.copy_(host, non_blocking=self._pinned)
            event = self._in.record_event()
        return there, _CudaEvent(self.device, event, host)

    def to_host(self, there: Tensor, host: Tensor) -> Event:
        """Begin a copy to the host."""
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._out):
            host.copy_(there, non_blocking=self._pinned)
            event = self._out.record_event()
        return _CudaEvent(self.device, event, there, host)

    def mark(self) -> Event:
        """What has been computed so far."""
        return _CudaEvent(self.device, torch.cuda.current_stream(self.device).record_event())
