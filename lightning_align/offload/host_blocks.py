"""Host memory as the place where blocks compute: the twin of ``device_blocks``, with no copies."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lightning_align.offload.block import Block


class HostBlocks:
    """Blocks in host memory, to and from which nothing is copied.

    Attributes:
        device: Host memory.
        lag: Blocks that are fetched before the gradients of one are here.
    """

    device = torch.device("cpu")
    lag = 0

    def admit(self, block: Block) -> None:
        """Let a block's parameters be here from now on, with or without their values."""
        if block.memory is not None:
            block.show(block.memory)

    updated = admit  # they were pieces of it

    def bring(self, block: Block) -> Tensor:
        """The memory that a block's parameters are in."""
        assert block.memory is not None
        return block.memory

    def leave(self, block: Block) -> None:
        """Give nothing up: there is no copy."""

    take_back = settle = leave

    def settle_all(self) -> None:
        """Wait for no copies."""

    def send(self, block: Block) -> None:  # noqa: ARG002
        """Leave gradients in ``p.grad``."""
        return

    def receive(self, block: Block, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Gradients in host memory."""
        return gradients

    def backward(self) -> AbstractContextManager[None]:
        """Around a backward."""
        return nullcontext()
