"""Blocks on the device that computes: copies of what is in host memory, and gradients on their way.

A copy is made when its block is about to compute, and given up with the block, or when an update
has changed the values in host memory. No gradient is waited for as soon as it is there: the device
would have nothing to do while the host adds up and steps. So a block's gradients are taken up when
those of the next one come, for which the host has given the device its work by then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.device import Copies, Event
from lightning_align.offload.host_blocks import HostBlocks

_GIVEN_UP = 2  # blocks that were given up and may still be computed with; more are waited for


class Arrived(NamedTuple):
    """Gradients of a block in host memory, once they were waited for.

    Attributes:
        memory: As long as the block's, and laid out like it.
        gradients: Views of it, by name of parameter.
        events: Ends of the copies, which hold what is copied.
    """

    memory: Tensor
    gradients: dict[str, Tensor]
    events: list[Event]

    def wait(self) -> None:
        """Until they are there."""
        while self.events:
            self.events.pop().wait()


class DeviceBlocks:
    """Copies of blocks on a device.

    Args:
        copies: Makes them.
        pool: Memory for gradients that come back.

    Attributes:
        device: Where they are.
        lag: Blocks that are fetched before the gradients of one are in host memory.
    """

    lag = 1

    def __init__(self, copies: Copies, pool: BufferPool) -> None:
        self.copies, self._pool = copies, pool
        self.device = copies.device
        self._read: dict[str, tuple[Event, Tensor]] = {}  # host memory that is being copied
        self._given_up: deque[Event] = deque()

    def admit(self, block: Block) -> None:
        """Let a block's parameters be on the device from now on, with or without their values."""
        if block.comes_and_goes:
            block.hide_there()
        else:
            self.bring(block)

    def bring(self, block: Block) -> Tensor:
        """The copy of a block whose values are in host memory; its parameters are there."""
        if block.there is None:
            while len(self._given_up) >= _GIVEN_UP:
                self._given_up.popleft().wait()
            self._copy(block, None)
        assert block.there is not None
        return block.there

    def updated(self, block: Block) -> None:
        """Values in host memory are others: what stays on the device becomes those, in place."""
        if block.comes_and_goes:
            self.leave(block)
        else:
            self._copy(block, block.there)

    @torch.inference_mode(False)  # a validation may fetch what training computes with
    @torch.no_grad()
    def _copy(self, block: Block, into: Tensor | None) -> None:
        assert block.memory is not None
        self.settle(block)
        self._read = {n: read for n, read in self._read.items() if not read[0].is_done}
        there, event = self.copies.to_device(block.memory, into)
        event.compute_waits()
        self._read[block.name] = event, block.memory
        block.show_there(there)

    def leave(self, block: Block) -> None:
        """Give a block's copy up; views that somebody has of it stay."""
        if block.there is not None:
            self._given_up.append(self.copies.mark())
        block.hide_there()

    @torch.no_grad()
    def take_back(self, block: Block) -> None:
        """Let the values in host memory be those of the copy, which somebody has edited."""
        assert block.there is not None
        assert block.memory is not None
        self.settle(block)
        self.copies.to_host(block.there, block.memory).wait()
        block.note_stored()

    def send(self, block: Block) -> Arrived:
        """Begin to copy a block's gradients to host memory."""
        return self._send(block, block.take_gradients())

    @torch.no_grad()
    def _send(self, block: Block, gradients: Mapping[str, Tensor]) -> Arrived:
        memory = self._pool.take(block.nbytes)
        views = {name: block.places[name].of(memory) for name in gradients}
        events = [self.copies.to_host(gradients[name], view) for name, view in views.items()]
        return Arrived(memory, views, events)

    def receive(self, block: Block, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Gradients in host memory, waited for."""
        arrived = self._send(block, gradients)
        arrived.wait()
        return arrived.gradients

    def backward(self) -> AbstractContextManager[Any]:
        """Around a backward, which would run in another thread than forward and waits."""
        context: Any = torch.autograd.set_multithreading_enabled
        found: AbstractContextManager[Any] = context(False)
        return found

    def settle(self, block: Block) -> None:
        """Wait until a block's host memory is no longer copied from."""
        if block.name in self._read:
            self._read.pop(block.name)[0].wait()

    def settle_all(self) -> None:
        """Wait for all copies."""
        for event, _ in self._read.values():
            event.wait()
        self._read.clear()


class Departures:
    """Gradients of one backward, on their way to host memory.

    Args:
        place: Where they are.
        arrived: Called with each block whose gradients have come, in the order of ``take``; None
            are in ``p.grad``.
    """

    def __init__(
        self,
        place: HostBlocks | DeviceBlocks,
        arrived: Callable[[Block, Arrived | None], object],
    ) -> None:
        self._place, self._arrived = place, arrived
        self._under_way: deque[tuple[Block, Arrived | None]] = deque()

    def take(self, block: Block) -> None:
        """Begin to copy a block's gradients, and take up those of the block before."""
        block.users += 1  # its values stay in host memory until it is updated
        self._under_way.append((block, self._place.send(block)))
        while len(self._under_way) > self._place.lag:
            self._take_up()

    def finish(self) -> None:
        """Take up all that is still under way."""
        while self._under_way:
            self._take_up()

    def drop(self) -> None:
        """Forget what is under way, where the backward has failed."""
        while self._under_way:
            self._wait()

    def _take_up(self) -> None:
        self._arrived(*self._wait())

    def _wait(self) -> tuple[Block, Arrived | None]:
        block, sent = self._under_way.popleft()
        block.users -= 1
        if sent is not None:
            sent.wait()
        return block, sent
