"""Gradients are taken away as a backward computes them, a block at a time.

They go into the sums of their window, to the ranks that update them, or at once into the update of
their block; where a device computes, by way of host memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_align.offload.block import Block
from lightning_align.offload.device_blocks import Arrived, Departures
from lightning_align.offload.gradients import GradientSums
from lightning_align.offload.prefetch import Residents
from lightning_align.offload.reductions import Reductions
from lightning_align.offload.store import ShardStore
from lightning_align.offload.updates import Updates


class Collector:
    """Takes gradients away.

    Args:
        store: Files of all blocks.
        residents: What is in memory.
        gradients: Of the open window.
        blocks: Those whose gradients do not stay in ``p.grad``.

    Attributes:
        updates: Of the optimizer, once there is one.
        early: Whether this backward updates blocks.
    """

    updates: Updates
    _departures: Departures  # of a backward

    def __init__(
        self,
        store: ShardStore,
        residents: Residents,
        gradients: GradientSums,
        blocks: Iterable[Block],
    ) -> None:
        self._store, self._residents, self._gradients = store, residents, gradients
        self._blocks = list(blocks)
        self.early = False
        self._waiting: dict[str, int] = {}  # block -> gradients that are still to come
        self._factor: Tensor | None = None  # by which this backward scales them
        self._scaled: set[str] = set()  # blocks that it has scaled
        self._reductions: Reductions | None = None  # of a backward that closes a window of ranks

    # A backward

    def begin(self, *, updates: bool, closes: bool, factor: Tensor | None) -> None:
        """A backward begins; the arguments are those of ``OffloadEngine.backward``."""
        self.early, self._factor = updates, None if factor is None else factor.cpu()
        self._scaled.clear()
        every = self._store.blocks.values()
        self._waiting = {block.name: len(block.trainable) for block in every}
        if closes and self._store.ranks.size > 1:
            summed = [] if self._gradients.stay else self._blocks[::-1]
            order = [block for block in summed if block.trainable]
            self._reductions = Reductions(self._store.ranks, self._gradients, order, self._reduced)
        self._departures = Departures(self._residents.place, self._collected)

    def arrived(self, block: Block) -> None:
        """The gradient of one of a block's parameters is there."""
        if self._gradients.stay:
            return
        self._waiting[block.name] -= 1
        if not self._waiting[block.name]:
            self._collect(block)

    def finish(self) -> None:
        """Take what the backward has left, and wait for all that is on its way."""
        for block in self._left():  # those of which some parameters have got no gradient
            self._collect(block)
        self._departures.finish()
        if self._reductions is not None:
            self._reductions.finish()
            self._share_what_stays()
            self._gradients.share_norms(self._blocks, self._store.ranks)

    def end(self) -> None:
        """A backward has ended, finished or not."""
        self._departures.drop()
        self.early, self._reductions = False, None

    # Blocks

    def _left(self) -> list[Block]:
        """Blocks whose gradients are in ``p.grad`` and should not be."""
        if self._gradients.stay:
            return []
        return [b for b in self._blocks if any(p.grad is not None for p in b.parameters.values())]

    def take_left(self) -> None:
        """Take what is in ``p.grad`` before a forward: gradients of a window that was resumed."""
        departures = Departures(self._residents.place, self._gradients.add)
        for block in self._left():
            departures.take(block)
        departures.finish()

    def _collect(self, block: Block) -> None:
        """All gradients of a block are there, on whatever device."""
        if block.gradients_stay:
            self._collected(block)
        else:
            self._departures.take(block)

    @torch.no_grad()
    def _collected(self, block: Block, arrived: Arrived | None = None) -> None:
        """All gradients of a block are there, in host memory."""
        reductions = self._reductions
        if self._gradients.is_used(block) or (reductions and reductions.has_taken(block)):
            raise RuntimeError(
                f"{block.name} has got a gradient after it was updated in the same backward, as"
                " under reentrant checkpointing. Set update_in_backward=False."
            )
        alone = self.early and not self._gradients.names(block)  # there is nothing to add them to
        if block.gradients_stay or (alone and reductions is None and arrived is None):
            if self.early and self._store.ranks.size == 1:
                self._scaled.add(block.name)
                self._gradients.use(block, factor=self._factor)
                self.updates.update_from_grad(block, "backward")
            return
        if reductions is not None:
            if self.early:
                self._residents.keep_section(block)
            reductions.take(block, arrived)
            return
        memory = self._gradients.add(block, arrived, factor=self._factor, store=not self.early)
        self._scaled.add(block.name)
        if self.early:
            self.updates.update(block, memory, "backward")

    @torch.no_grad()
    def _reduced(self, block: Block, section: Tensor, present: Tensor) -> None:
        """The means over ranks of a block's gradients are there."""
        self._scaled.add(block.name)
        factor, store = self._factor, not self.early
        self._gradients.reduced(block, section, present, factor=factor, store=store)
        if self.early:
            self.updates.update(block, section, "backward")

    @torch.no_grad()
    def _share_what_stays(self) -> None:
        """Put means over ranks in the place of gradients that stay in ``p.grad``."""
        every = self._store.blocks.values()
        staying = [b for b in every if b.gradients_stay or self._gradients.stay]
        parameters = [p for block in staying for p in block.trainable.values()]
        self._store.ranks.share_gradients(parameters)

    # Between backward and update

    def has_scaled(self, factor: Tensor | float) -> bool:
        """Whether the last backward has multiplied gradients by a factor, as it was told to.

        Those that it did not come to are multiplied now.
        """
        if self._factor is None:
            return False
        assert torch.equal(self._factor, torch.as_tensor(factor))
        for block in self._blocks:
            if block.name not in self._scaled and self._gradients.names(block):
                self._gradients.add(block, factor=factor)
        self._factor = None
        return True
