"""A module whose blocks are in memory only while they compute.

Before the forward of a block its values are fetched, and again for what its backward needs of them
(``saved_weights``). When all gradients of a block are there they leave memory, too; either the
block is updated at once, in the middle of backward, or when the optimizer's step comes. What
belongs to no block (embedding, head, final norm, whatever is tied) stays in memory: losses read it
where nobody calls its module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_align.offload.activations import Activations
from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool, Memory
from lightning_align.offload.collector import Collector
from lightning_align.offload.device import Copies
from lightning_align.offload.device_blocks import DeviceBlocks
from lightning_align.offload.files import Threads
from lightning_align.offload.gradients import GradientSums
from lightning_align.offload.optimizer_stream import StepsParameters
from lightning_align.offload.prefetch import Residents
from lightning_align.offload.saved_weights import SavedWeights
from lightning_align.offload.store import ShardStore
from lightning_align.offload.updates import Updates
from lightning_align.offload.whole_values import WholeValues


class OffloadEngine:
    """Fetches, updates and stores the blocks of a module.

    Args:
        modules: Block -> the module whose forward it is for; None for the one that stays.
        store: Files of all blocks.
        threads: Who reads and writes.
        memory: How much of it may be in memory.
        activations: Where what else forward saves waits for backward; None leaves it in memory.

    Attributes:
        residents: What is in memory.
        gradients: Of the open window.
        updates: Of the optimizer, once there is one.
        whole: Values of all parameters.
    """

    updates: Updates

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        store: ShardStore,
        threads: Threads,
        memory: Memory,
        activations: Activations | None = None,
    ) -> None:
        self.store, self.threads = store, threads
        self.activations = activations
        self.blocks = list(store.blocks.values())
        self.pool = BufferPool(memory.pool_bytes, self._relieve, pinned=memory.pinned)
        self.residents = Residents(store, self.pool, memory.blocks)
        self._moving = [block for block in self.blocks if block.comes_and_goes]
        self._summed = [block for block in self.blocks if not block.gradients_stay]
        folders = None if memory.gradients else store.folders
        self.gradients = GradientSums(folders, self._summed, self.pool, threads)
        self._collector = Collector(store, self.residents, self.gradients, self._summed)
        self._memory = memory
        self._modules = dict(modules)
        self.whole = WholeValues(store, self.residents, self.pool)
        self._saved = SavedWeights(self.residents, self.blocks, activations)
        self._owner = {
            p: store.blocks[name]
            for name in modules
            for p in store.blocks[name].parameters.values()
        }
        self._hooked: set[nn.Parameter] = set()
        self._phase = "forward"  # in backward a block that recomputes is called, too
        self._handles: list[Any] = []

    def _relieve(self) -> None:
        """Wait for writes and copies: what they hold comes back to the pool."""
        self.store.settle_all()
        self.gradients.settle_all()
        self.residents.place.settle_all()

    def attach(self) -> None:
        """Fetch blocks from now on when their modules are called."""
        if self._handles:
            return
        for block in self.blocks:
            module = self._modules.get(block.name)
            stays = block.states_stay and not block.comes_and_goes  # there is nothing to fetch
            if module is not None and not stays:
                hooks: Any = module
                self._handles += [
                    hooks.register_forward_pre_hook(self._before(block), prepend=True),
                    hooks.register_forward_hook(self._after(block), always_call=True),
                ]

    def detach(self) -> None:
        """Leave the modules alone; their values stay where they are."""
        while self._handles:
            self._handles.pop().remove()
        self._hooked.clear()
        self.gradients.clear()
        self.compute_on(None)
        self.residents.release_all()
        self.pool.trim()

    def compute_on(self, copies: Copies | None) -> None:
        """Let the modules compute on a device from now on.

        Args:
            copies: To and from it; None means in host memory, as at the beginning.
        """
        host = self.residents.host
        self.residents.compute_in(DeviceBlocks(copies, self.pool) if copies else host)

    def optimize_with(
        self, optimizer: Optimizer, *, fresh: bool, has_masters: bool = False
    ) -> None:
        """Reserve room for an optimizer's state, and step it from now on.

        Args:
            optimizer: The user's.
            fresh: Whether it has no state yet; otherwise what is stored is its.
            has_masters: Whether parameters of half precision have fp32 masters.

        Raises:
            OSError: If there is no room.
        """
        whole = self.store.ranks.size > 1 and isinstance(optimizer, StepsParameters)
        if fresh and whole != self.store.whole:
            self.whole.arrange(whole=whole)
            self.gradients.place()
        self.updates = Updates(
            optimizer,
            self.store,
            self.residents,
            self.gradients,
            self.pool,
            self._memory.group_bytes,
            self._memory.groups,
            fresh=fresh,
            has_masters=has_masters,
        )
        self._collector.updates = self.updates

    # Forward and backward

    def _before(self, block: Block) -> Callable[..., None]:
        def fetch(*_: Any) -> None:
            block.users += 1
            self.residents.fetch(block, self._phase)

        return fetch

    def _after(self, block: Block) -> Callable[..., None]:
        def enter(_: Tensor) -> None:  # the gradient of its output is there: its backward is next
            self.residents.fetch(block, "backward")
            if self._collector.early:
                self.updates.foresee(block)

        def done(_: nn.Module, __: Any, outputs: Any) -> None:
            block.users -= 1
            for output in tree_leaves(outputs):
                if isinstance(output, Tensor) and output.requires_grad:
                    output.register_hook(enter)  # type: ignore[no-untyped-call]

        return done

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward that may be followed by a backward."""
        self.residents.begin("forward")
        self._collector.take_left()
        for parameter in self._owner.keys() - self._hooked:
            if parameter.requires_grad:
                hooks: Any = parameter
                self._handles.append(hooks.register_post_accumulate_grad_hook(self._arrived))
                self._hooked.add(parameter)
        if self.activations is not None:
            self.activations.begin()
        with self._saved.notes() if self._moving or self.activations else nullcontext():
            yield

    @contextmanager
    def backward(
        self, *, updates: bool, closes: bool = True, factor: Tensor | None = None
    ) -> Iterator[None]:
        """Around a backward.

        Args:
            updates: Whether each block is updated as soon as its gradients are there.
            closes: Whether it is the last of its window, behind which ranks share gradients.
            factor: What ``scale_gradients`` will be called with, if that is known already.
        """
        self.finish_updates()  # of blocks that this forward has not called
        self.residents.begin("backward")
        self._phase = "backward"
        self._collector.begin(updates=updates, closes=closes, factor=factor)
        try:
            with self.residents.place.backward():
                yield
            if self.activations is not None:
                self.activations.settle()
            self._collector.finish()
        finally:
            self._collector.end()
            self._phase = "forward"

    def _arrived(self, parameter: nn.Parameter) -> None:
        self._collector.arrived(self._owner[parameter])

    # Gradients, between backward and update

    @property
    def updates_wait(self) -> bool:
        """Whether updates wait for the next forward; then no window is open."""
        return hasattr(self, "updates") and self.updates.late.are_waiting

    def finish_updates(self) -> None:
        """Do the updates that wait for the next forward."""
        if self.updates_wait:
            self.updates.late.finish()

    @torch.no_grad()
    def put_gradients(self, gradients: Mapping[str, Tensor]) -> set[str]:
        """Let gradients be all that waits, but for what does so in ``p.grad``.

        Args:
            gradients: By name of parameter.

        Returns:
            Names of those that wait now.
        """
        self.finish_updates()
        self.gradients.clear()
        blocks = () if self.gradients.stay else self._summed
        return {name for block in blocks for name in self.gradients.take_back(block, gradients)}

    @torch.no_grad()
    def scale_gradients(self, factor: Tensor | float, parameters: Iterable[nn.Parameter]) -> None:
        """Multiply the gradients of parameters, those of blocks when they are read."""
        here = [p.grad for p in parameters if p.grad is not None]
        if here:
            there = factor.to(here[0].device) if isinstance(factor, Tensor) else factor
            torch._foreach_mul_(here, there)
        if self.gradients.stay:
            return
        factor = factor.cpu() if isinstance(factor, Tensor) else factor
        if self._collector.has_scaled(factor):
            return
        norms = self.gradients.norms
        for parameter in norms:
            norms[parameter] = norms[parameter] * factor
        self.gradients.edits.append(lambda gradient: gradient.mul_(factor))

    @torch.no_grad()
    def clip_values(self, limit: float, parameters: Iterable[nn.Parameter]) -> None:
        """Clamp the gradients of parameters, those of blocks when they are read."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.clamp_(-limit, limit)
        self.gradients.edits.append(lambda gradient: gradient.clamp_(-limit, limit))

    # The end

    def let_go(self, parameters: Collection[nn.Parameter]) -> None:
        """Give up the memory of blocks that nobody trains, if all of their parameters are named.

        Their files on a drive stay, as a committed step has them.
        """
        named = set(parameters)
        for block in self.blocks:
            if block.read_only and named.issuperset(block.parameters.values()):
                self._modules.pop(block.name, None)
                self.residents.let_go(block)
                self.store.let_go(block.name)
        self.pool.trim()

    def close(self) -> None:
        """Close all files."""
        self.detach()
        self.gradients.close()
        if self.activations is not None:
            self.activations.close()
        self.store.close()
        self.threads.close()
