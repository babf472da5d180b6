"""A module whose blocks are in memory only while they compute.

Before the forward of a block its values are fetched. Autograd would keep them for backward, so what
it saves of a block is replaced by a note of which part of which block it was
(``saved_tensors_hooks``), and backward fetches that block again. No weight is held twice, nothing
depends on the order in which hooks are called, and a version counter has nothing to object to.

When all gradients of a block are there they leave memory, too; either the block is updated at once,
in the middle of backward, or when the optimizer's step comes. What belongs to no block (embedding,
head, final norm, whatever is tied) stays in memory: losses read it where nobody calls its module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_align._compat.glibc_memory import give_back_freed
from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import Threads
from lightning_align.offload.gradients import GradientSums
from lightning_align.offload.optimizer_stream import (
    OptimizerStream,
    StepsParameters,
    expected_state_bytes,
)
from lightning_align.offload.prefetch import Residents
from lightning_align.offload.store import ShardStore


@dataclass(frozen=True)
class Memory:
    """How much may be in memory.

    Attributes:
        blocks: Blocks whose parameters are there at a time, at least 2.
        gradients: Whether the gradients of all blocks stay there.
        group_bytes: Optimizer state that is there at a time.
        pool_bytes: What all of it may take together; None leaves that open.
    """

    blocks: int = 3
    gradients: bool = False
    group_bytes: int = 64 << 20
    pool_bytes: int | None = None


class _Saved(NamedTuple):
    """What autograd saved of a block's memory."""

    block: Block
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class OffloadEngine:
    """Fetches, updates and stores the blocks of a module.

    Args:
        modules: Block -> the module whose forward it is for; None for the one that stays.
        store: Files of all blocks.
        threads: Who reads and writes.
        memory: How much of it may be in memory.

    Attributes:
        residents: What is in memory.
        gradients: Of the open window.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        store: ShardStore,
        threads: Threads,
        memory: Memory,
    ) -> None:
        self.store, self.threads = store, threads
        self.blocks = list(store.blocks.values())
        self.pool = BufferPool(memory.pool_bytes, self._relieve)
        self.residents = Residents(store, self.pool, memory.blocks)
        self._moving = moving = [block for block in self.blocks if not block.kept]
        folder = None if memory.gradients else store.folder
        self.gradients = GradientSums(folder, moving, self.pool, threads)
        self._memory = memory
        self._modules = modules
        self._stream: OptimizerStream | None = None
        self._optimizer: Optimizer | None = None
        self._absent = {
            storage: f"{name} of {block.name}"
            for block in moving
            for storage, name in block.absent().items()
        }
        self._owner = {p: block for block in moving for p in block.parameters.values()}
        self._hooked: set[nn.Parameter] = set()
        self._waiting: dict[str, int] = {}  # block -> gradients that are still to come
        self._updates = False  # whether this backward updates blocks
        self._factor: Tensor | None = None  # by which this backward scales them
        self._scaled: set[str] = set()  # blocks that it has scaled
        self._phase = "forward"  # in backward a block that recomputes is called, too
        self._handles: list[Any] = []

    def _relieve(self) -> None:
        """Wait for writes: what they hold comes back to the pool."""
        self.store.settle_all()
        self.gradients.settle_all()

    # The beginning

    @torch.no_grad()
    def store_values(self) -> None:
        """Write the values that the parameters have, block by block, and let them go."""
        for number, block in enumerate(self.blocks):
            if number > 1:  # no read waits behind these writes, so they would pile up in memory
                self.store.settle(self.blocks[number - 2].name)
            memory = self.pool.take(block.nbytes)
            block.copy_into(memory)
            self.store.write(block.name, memory)
            self.store.update_done(block.name)
            if block.kept:
                block.show(memory)
            else:
                block.hide()
        give_back_freed()

    def read_values(self) -> None:
        """Let go the values that the parameters have, and take the stored ones."""
        for block in self.blocks:
            block.hide()
            if block.kept:
                self.residents.fetch(block, "begin")
        give_back_freed()

    def attach(self) -> None:
        """Fetch blocks from now on when their modules are called."""
        for block in self.blocks:
            module = self._modules.get(block.name)
            if module is not None:
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
        self.residents.release_all()
        self.pool.trim()

    def optimize_with(self, optimizer: Optimizer, *, fresh: bool) -> None:
        """Reserve room for an optimizer's state, and step it from now on.

        Args:
            optimizer: The user's.
            fresh: Whether it has no state yet; otherwise what is stored is its.

        Raises:
            OSError: If there is no room.
        """
        if fresh:
            self.store.forget_states()
        state_bytes = {block.name: expected_state_bytes(optimizer, block) for block in self.blocks}
        self.store.allocate(state_bytes)
        self._optimizer = optimizer
        self._stream = OptimizerStream(optimizer, self.store, self.pool, self._memory.group_bytes)

    # Forward and backward

    def _before(self, block: Block) -> Callable[..., None]:
        def fetch(*_: Any) -> None:
            block.users += 1
            self.residents.fetch(block, self._phase)

        return fetch

    def _after(self, block: Block) -> Callable[..., None]:
        def enter(_: Tensor) -> None:  # the gradient of its output is there: its backward is next
            self.residents.fetch(block, "backward")
            if self._updates and self._stream is not None and block.trainable:
                self._stream.foresee(block, lambda name: block.parameters[name].requires_grad)

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
        for block in self._moving:  # gradients of a window that was resumed
            if any(p.grad is not None for p in block.parameters.values()):
                self.gradients.add(block)
        for parameter in self._owner.keys() - self._hooked:
            if parameter.requires_grad:
                hooks: Any = parameter
                self._handles.append(hooks.register_post_accumulate_grad_hook(self._arrived))
                self._hooked.add(parameter)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        if tensor.layout != torch.strided:
            return tensor
        storage = tensor.untyped_storage().data_ptr()
        if storage in self._absent:
            raise RuntimeError(
                f"Parameter {self._absent[storage]} was used while it is not in memory: only the"
                " forward of its block may read it. Read it in `with strategy.gathered([name])`, or"
                " choose blocks with wrap_policy so that it is in none."
            )
        block = self.residents.by_storage.get(storage)
        if block is None:
            return tensor
        return _Saved(
            block,
            tensor.dtype,
            int(tensor.storage_offset()),
            tuple(tensor.shape),
            tensor.stride(),
        )

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        memory = self.residents.fetch(saved.block, "backward")
        empty = torch.empty(0, dtype=saved.dtype)
        return empty.set_(memory.untyped_storage(), saved.offset, saved.shape, saved.stride)

    @contextmanager
    def backward(self, *, updates: bool, factor: Tensor | None = None) -> Iterator[None]:
        """Around a backward.

        Args:
            updates: Whether each block is updated as soon as its gradients are there.
            factor: What ``scale_gradients`` will be called with, if that is known already.
        """
        self.residents.begin("backward")
        self._updates, self._factor = updates, factor
        self._scaled.clear()
        self._phase = "backward"
        self._waiting = {block.name: len(block.trainable) for block in self.blocks}
        try:
            yield
            for block in self._moving:  # those of which some parameters have got no gradient
                if any(p.grad is not None for p in block.parameters.values()):
                    self._collect(block)
        finally:
            self._updates, self._phase = False, "forward"

    def _arrived(self, parameter: nn.Parameter) -> None:
        block = self._owner[parameter]
        self._waiting[block.name] -= 1
        if not self._waiting[block.name]:
            self._collect(block)

    @torch.no_grad()
    def _collect(self, block: Block) -> None:
        """All gradients of a block are there."""
        if self.gradients.is_used(block):
            raise RuntimeError(
                f"{block.name} has got a gradient after it was updated in the same backward, as"
                " under reentrant checkpointing. Set update_in_backward=False."
            )
        memory = self.gradients.add(block, factor=self._factor, store=not self._updates)
        self._scaled.add(block.name)
        if self._updates:
            self._update(block, memory)

    # Gradients, between backward and update

    def waiting_gradients(self) -> dict[str, Tensor]:
        """Copies of the sums of the open window, by name of parameter."""
        found = {}
        for block in self._moving:
            if names := self.gradients.names(block):
                sums = self.gradients.take(block)
                found.update({name: block.places[name].of(sums).clone() for name in names})
        return found

    def norms(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """Norms of the gradients that are there, parameter by parameter."""
        known = self.gradients.norms
        return [
            known[p] if p in known else torch.linalg.vector_norm(p.grad)
            for p in parameters
            if p in known or p.grad is not None
        ]

    @torch.no_grad()
    def scale_gradients(self, factor: Tensor | float, parameters: Iterable[nn.Parameter]) -> None:
        """Multiply the gradients of parameters, those of blocks when they are read."""
        here = [p.grad for p in parameters if p.grad is not None]
        if here:
            torch._foreach_mul_(here, factor)
        if self._factor is not None:
            assert torch.equal(self._factor, torch.as_tensor(factor))
            for block in self._moving:  # those that the last backward did not come to
                if block.name not in self._scaled and self.gradients.names(block):
                    self.gradients.add(block, factor=factor)
            self._factor = None
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

    # Updates

    @torch.no_grad()
    def step(self) -> None:
        """Update what has gradients and was not updated in backward; the window is over."""
        assert self._optimizer is not None
        everything = [p for block in self.blocks for p in block.parameters.values()]
        may_step = True
        if isinstance(self._optimizer, StepsParameters):
            may_step = self._optimizer.begin_step(self.norms(everything))
        self.residents.begin("update")
        waiting = [
            block
            for block in (self._moving if may_step else ())
            if self.gradients.names(block) and not self.gradients.is_used(block)
        ]
        for number, block in enumerate(waiting):
            following = waiting[number + 1 : number + 2]
            self._update(block, self.gradients.take(block), partial(self._foresee, following))
        for block in self.blocks if may_step else ():
            if block.kept:
                self._update_kept(block)
        for parameter in everything:
            parameter.grad = None
        self.gradients.clear()

    def _foresee(self, blocks: list[Block]) -> None:
        """Begin to read what the updates of blocks will need, but for their parameters."""
        assert self._stream is not None
        for block in blocks:
            self.gradients.foresee(block)
            self._stream.foresee(block, self.gradients.names(block).__contains__)

    def _update(
        self, block: Block, sums: Tensor, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        assert self._stream is not None
        self.residents.fetch(block, "backward" if self._updates else "update")
        names = self.gradients.names(block)

        def gradient(name: str) -> Tensor | None:
            return block.places[name].of(sums) if name in names else None

        for name in names:
            self.gradients.edit(block.places[name].of(sums))
        self._stream.update(block, gradient, meanwhile)
        self.gradients.used(block)

    def _update_kept(self, block: Block) -> None:
        assert self._stream is not None
        gradients = {name: p.grad for name, p in block.parameters.items()}
        if any(gradient is not None for gradient in gradients.values()):
            for parameter in block.parameters.values():
                parameter.grad = None
            self._stream.update(block, gradients.get)

    # Whole values

    @contextmanager
    def gathered(
        self,
        parameters: Iterable[str | nn.Parameter] | None = None,
        *,
        modify: bool = False,
    ) -> Iterator[None]:
        """All parameters, or some, in memory for a while.

        Args:
            parameters: They or their names; their whole blocks are fetched.
            modify: Whether their values are stored at the end.
        """
        wanted = None if parameters is None else set(parameters)
        blocks = [
            block
            for block in self.blocks
            if wanted is None
            or wanted & block.parameters.keys()
            or wanted.intersection(block.parameters.values())
        ]
        for block in blocks:
            block.users += 1
            self.residents.fetch(block, "gathered")
        try:
            yield
        finally:
            for block in blocks:
                block.users -= 1
                if modify:
                    self._rewrite(block)
                self.residents.release(block)

    def _rewrite(self, block: Block) -> None:
        assert block.memory is not None
        self.store.settle(block.name)
        self.store.carry_states(block.name, self.pool)
        self.store.write(block.name, block.memory)
        self.store.update_done(block.name)

    def forget_state(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let the optimizer begin anew for some parameters."""
        assert self._optimizer is not None
        dropped = set(parameters)
        for parameter in dropped:
            self._optimizer.state.pop(parameter, None)
        for block in self.blocks:
            for name, parameter in block.parameters.items():
                if parameter in dropped:
                    self.store.forget_state(block.name, name)

    @torch.no_grad()
    def values(self) -> dict[nn.Parameter, Tensor]:
        """Copies of all parameters."""
        copies = {}
        for block in self.blocks:
            memory = self.residents.fetch(block, "values")
            for name, parameter in block.parameters.items():
                copies[parameter] = block.places[name].of(memory).clone()
        return copies

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's whole state, in memory."""
        assert self._stream is not None
        assert self._optimizer is not None
        for block in self.blocks:
            self.store.settle(block.name)
            self._stream.load(block)
        state = self._optimizer.state_dict()
        in_order = sorted(state["state"].items())  # not as blocks were stepped
        state = {**state, "state": {key: dict(value) for key, value in in_order}}
        for block in self.blocks:
            self._stream.drop(block)
        return state

    @torch.no_grad()
    def put_optimizer_state(self) -> None:
        """Store what ``optimizer.load_state_dict`` has brought into memory."""
        assert self._stream is not None
        for block in self.blocks:
            memory = self.residents.fetch(block, "values")
            self.store.settle(block.name)
            self._stream.save(block)
            self.store.write(block.name, memory)
            self.store.update_done(block.name)

    def close(self) -> None:
        """Close all files."""
        self.detach()
        self.gradients.close()
        self.store.close()
        self.threads.close()
