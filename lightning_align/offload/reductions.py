"""Gradients of a window's last backward, on their way to the ranks that use them.

Within a window each rank adds up its own gradients, as DDP does without its synchronization; behind
the last backward of a block their means over ranks go to the rank that updates them, while the next
block computes. Blocks are taken in one order on all ranks, whichever is finished first on each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from torch import Tensor

from lightning_align.offload.block import Block
from lightning_align.offload.device_blocks import Arrived
from lightning_align.offload.gradients import GradientSums
from lightning_align.offload.ranks import Ranks


class Reductions:
    """Those of one backward.

    Args:
        ranks: Who takes part.
        gradients: Where the sums are.
        order: Blocks as their gradients are expected.
        done: Called with a block, this rank's section of its means, and for each parameter whether
            it has one.
    """

    def __init__(
        self,
        ranks: Ranks,
        gradients: GradientSums,
        order: Iterable[Block],
        done: Callable[[Block, Tensor, Tensor], None],
    ) -> None:
        self._ranks, self._gradients, self._done = ranks, gradients, done
        self._order = deque(order)
        self._taken: set[str] = set()
        self._ready: dict[str, tuple[Tensor, Tensor]] = {}
        self._under_way: tuple[Block, Tensor, Future[Tensor]] | None = None

    def has_taken(self, block: Block) -> bool:
        """Whether the gradients of a block were taken."""
        return block.name in self._taken

    def take(self, block: Block, arrived: Arrived | None = None) -> None:
        """Take the gradients of a block, which are all there.

        Args:
            block: Which one.
            arrived: They, from a device; None means those in ``p.grad``.
        """
        self._taken.add(block.name)
        self._ready[block.name] = self._gradients.to_reduce(block, arrived)
        while self._order and self._order[0].name in self._ready:
            following = self._order.popleft()
            memory, present = self._ready.pop(following.name)
            begun = self._ranks.mean(following, memory, present)
            self._complete()
            self._under_way = following, present, begun

    def finish(self) -> None:
        """Take those that the backward did not come to, and wait for all."""
        for block in [block for block in self._order if not self.has_taken(block)]:
            self.take(block)
        self._complete()

    def _complete(self) -> None:
        if self._under_way is not None:
            block, present, begun = self._under_way
            self._under_way = None
            section = begun.result()
            if present.any():
                self._done(block, section, present)
