"""The user's own optimizer, stepped for a few tensors at a time, with its state on disk.

An optimizer that treats every parameter by itself does the same whether it is shown all of them or
one after the other. So it is called again and again, each time with the gradients of a few
parameters, whose state was read into reused memory before and is written back behind. What is small
(counters of steps) stays in ``optimizer.state``; large tensors are there only while they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from operator import itemgetter
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_align._compat.torch_optimizers import unhooked_step
from lightning_align._errors import argument_error
from lightning_align.mapped import part_of
from lightning_align.offload import masters
from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import Transfer
from lightning_align.offload.linked import Stretch, outline
from lightning_align.offload.places import Place, aligned, placed
from lightning_align.offload.record import StatePlace
from lightning_align.offload.store import ShardStore

_BY_THEMSELVES = (AdamW, Adam, SGD)  # of torch, each parameter by itself


@runtime_checkable
class StepsParameters(Protocol):
    """An optimizer that can be stepped for one parameter after the other."""

    def begin_step(self, norms: list[Tensor]) -> bool:
        """Whether a step of gradients with these norms may be taken; counts it."""
        ...

    def step_param(self, parameter: Tensor) -> None:
        """The step of one parameter."""
        ...


def check_optimizer(optimizer: Optimizer, where: str) -> None:
    """Refuse an optimizer that looks across parameters, or that we do not know not to.

    Raises:
        ValueError: If it is one.
    """
    if type(optimizer) in _BY_THEMSELVES or isinstance(optimizer, StepsParameters):
        return
    rule = "it is not known to treat each parameter by itself, and its state is not all in memory"
    way_out = "Use torch's AdamW, Adam or SGD, StableAdamW, Muon or GaLoreAdamW"
    raise argument_error(where, "optimizer", type(optimizer).__name__, rule, way_out)


def expected_state_bytes(optimizer: Optimizer, block: Block, *, has_masters: bool = False) -> int:
    """Bytes of state that a block will have; 0 where only its first step will show.

    Args:
        optimizer: Whose state.
        block: Of which.
        has_masters: Whether there are fp32 masters, with moments in fp32, too.
    """
    count = {AdamW: 2, Adam: 2, SGD: 1}.get(type(optimizer), 0)
    known = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    total = 0
    for name, piece in block.pieces.items():
        group = known.get(id(block.parameters[name]), {})
        tensors = count + bool(group.get("amsgrad"))
        if not group or (type(optimizer) is SGD and not group["momentum"]):
            continue
        numel = torch.Size(piece.place.shape).numel()
        if numel == 1:  # its state stays in memory, as counters of steps do
            continue
        dtype = torch.float32 if has_masters else piece.place.dtype
        total += aligned((tensors + has_masters) * aligned(numel, 64) * dtype.itemsize)
    return total


class OptimizerStream:
    """Steps blocks.

    Args:
        optimizer: The user's.
        store: Where parameters and states are.
        pool: Memory for states.
        group_bytes: Bytes of state of a group; a single parameter's always are one.
        group_count: Groups that are in memory at a time, one of which is stepped.
        has_masters: Whether parameters are stepped in fp32, from which they are then rounded.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        store: ShardStore,
        pool: BufferPool,
        group_bytes: int,
        group_count: int = 2,
        *,
        has_masters: bool = False,
    ) -> None:
        self._optimizer, self._store, self._pool = optimizer, store, pool
        self._has_masters = has_masters
        self._group_bytes, self._group_count = group_bytes, group_count
        self._step = unhooked_step(optimizer)
        self._reading: dict[str, tuple[Tensor, Transfer]] = {}

    @torch.no_grad()
    def update(
        self,
        block: Block,
        section: Tensor,
        gradients: Callable[[str], Tensor | None],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Step this rank's pieces of a block, which are in memory, and write them.

        Args:
            block: Which one.
            section: What they lie in; parameters are their pieces.
            gradients: That of a piece, for the name of its parameter; None leaves it alone.
            meanwhile: Called when all that this update reads is being read.
        """
        self._store.settle(block.name)  # its memory may still be on its way to the disk
        if block.states_stay:
            meanwhile()
            self._step_parameters(block, list(block.pieces), gradients)
        else:
            self._step_groups(block, gradients, meanwhile)
        self._store.write(block.name, section)
        self._store.update_done(block.name)

    def _step_groups(
        self,
        block: Block,
        gradients: Callable[[str], Tensor | None],
        meanwhile: Callable[[], None],
    ) -> None:
        groups = list(self._groups(block, gradients))
        self._forget_others(block, groups)
        for number, names in enumerate(groups):
            for ahead in groups[number : number + self._group_count]:
                self._read_ahead(block, ahead)
            if number + 1 == len(groups):
                meanwhile()
            memories = {name: self._attach(block, name) for name in names}
            self._step_parameters(block, names, gradients)
            self._write(block, [self._detach(block, name, memories[name]) for name in names])

    def foresee(
        self, block: Block, has_gradient: Callable[[str], bool], *, beside_another: bool = False
    ) -> None:
        """Begin to read what the first groups of a block's update will need.

        Args:
            block: Which one.
            has_gradient: Whether a parameter will be stepped, by its name.
            beside_another: Whether a group of another block is in memory until then.
        """
        count = 1 if beside_another else self._group_count
        if block.states_stay or self._group_count == 1:
            return
        self._store.settle(block.name)
        nothing = torch.empty(0)
        groups = self._groups(block, lambda name: nothing if has_gradient(name) else None)
        for group in islice(groups, count):
            self._read_ahead(block, group)

    def _forget_others(self, block: Block, groups: list[list[str]]) -> None:
        """Drop what was foreseen of a block and is not needed: at its next update it is old."""
        needed = {name for names in groups for name in names}
        for name in (block.pieces.keys() - needed) & self._reading.keys():
            self._reading.pop(name)[1].wait()

    def show(self, block: Block) -> None:
        """Let ``optimizer.state`` have a block's state as its file shows it."""
        places = self._store.states[block.name]
        if block.states_stay or not any(place.tensors for place in places.values()):
            return
        whole = self._store.state_values(block.name)
        for name, place in places.items():
            state = self._optimizer.state[block.parameters[name]]
            start = place.offset - block.section_nbytes
            for key, where in place.tensors.items():
                state[key] = part_of(whole, start + where.offset, where.shape, where.dtype)

    def outline(self, block: Block) -> None:
        """Let ``optimizer.state`` have of a block's state what ``linked`` links."""
        if block.states_stay:
            return
        file = self._store.file(block.name)
        for name, place in self._store.states[block.name].items():
            state, piece = self._optimizer.state[block.parameters[name]], block.pieces[name]
            is_part = piece.place.shape != block.places[name].shape
            for key, where in place.tensors.items():
                length = torch.Size(where.shape).numel()
                stretch = Stretch(file, place.offset + where.offset, piece.start, length)
                shape = block.places[name].shape if is_part else where.shape
                state[key] = outline(shape, where.dtype, [stretch])

    def drop(self, block: Block) -> None:
        """Forget what ``show`` or ``outline`` has brought."""
        for name in () if block.states_stay else block.pieces:
            _remove_large(self._state(block, name))

    def save(self, block: Block) -> None:
        """Write what ``optimizer.state`` has of a block, and remove it there.

        The caller writes the parameters, and then says that the update is done.
        """
        self._forget_others(block, [])
        names = () if block.states_stay else block.pieces
        self._write(block, [self._detach(block, name, None) for name in names])

    def _groups(
        self, block: Block, gradients: Callable[[str], Tensor | None]
    ) -> Iterator[list[str]]:
        """Parameters whose states are in memory together."""
        moves = self._store.moves(block.name)  # then what is not stepped comes along, too
        group: list[str] = []
        size = 0
        for name in block.pieces:
            if not moves and gradients(name) is None:
                continue
            place = self._store.states[block.name].get(name)
            # Before the first step: most have two tensors, in memory of their own until it ends.
            nbytes = place.capacity if place else 2 * block.pieces[name].place.nbytes
            if group and size + nbytes > self._group_bytes:
                yield group
                group, size = [], 0
            group.append(name)
            size += nbytes
        yield group

    def _read_ahead(self, block: Block, names: list[str]) -> None:
        states = self._store.states[block.name]
        places = {n: states[n] for n in names if n in states and n not in self._reading}
        places = {name: place for name, place in places.items() if place.tensors}
        for run in _runs(places):
            first = places[run[0]].offset
            memory = self._pool.take(sum(places[name].capacity for name in run))
            transfer = self._store.read_more(block.name, memory, first)
            for name in run:
                start, stop = places[name].offset - first, places[name].end - first
                self._reading[name] = memory[start:stop], transfer

    def _attach(self, block: Block, name: str) -> Tensor | None:
        if name not in self._reading:
            return None
        memory, transfer = self._reading.pop(name)
        transfer.wait()
        tensors = self._store.states[block.name][name].tensors
        state = self._optimizer.state[block.parameters[name]]
        state.update({key: where.of(memory) for key, where in tensors.items()})
        return memory

    def _detach(self, block: Block, name: str, memory: Tensor | None) -> tuple[int, Tensor] | None:
        """Have a parameter's state in the memory that it was in, or in one that is made.

        Returns:
            Where in the file it goes, and its bytes; None if there is none.
        """
        state = self._state(block, name)
        large = {key: value for key, value in state.items() if is_large(value)}
        known = self._store.states[block.name]
        if not large:
            self._store.forget_state(block.name, name)
            return None
        places, nbytes = placed(large)
        place = self._store.place_state(block.name, name, nbytes)
        if memory is None or len(memory) < nbytes:
            memory = self._pool.take(place.capacity)
        _copy_unless_there(large, places, memory)
        known[name] = StatePlace(place.offset, place.capacity, places)
        _remove_large(state)
        return place.offset, memory[:nbytes]

    def _write(self, block: Block, parts: list[tuple[int, Tensor] | None]) -> None:
        """Write parts of a block's state; those that lie one behind the other at once."""
        joined: list[tuple[int, Tensor]] = []
        for offset, memory in sorted(filter(None, parts), key=itemgetter(0)):
            if joined and joined[-1][0] + len(joined[-1][1]) == offset:
                whole = _one_behind_the_other(joined[-1][1], memory)
                if whole is not None:
                    joined[-1] = joined[-1][0], whole
                    continue
            joined.append((offset, memory))
        for offset, memory in joined:
            self._store.write(block.name, memory, offset)

    def _step_parameters(
        self, block: Block, names: list[str], gradients: Callable[[str], Tensor | None]
    ) -> None:
        stepped: dict[nn.Parameter, Tensor] = {}  # with their values in half precision
        for name in names:
            parameter, gradient = block.parameters[name], gradients(name)
            if gradient is not None:
                stepped[parameter] = parameter.data
                if self._has_masters:
                    parameter.grad = None
                    masters.lift(parameter, self._optimizer.state[parameter])
                parameter.grad = gradient.to(parameter.dtype)
        if not stepped:
            return
        if isinstance(self._optimizer, StepsParameters):
            for parameter in stepped:
                self._optimizer.step_param(parameter)
        else:
            with self._alone(list(stepped)):
                self._step()
        for parameter, half in stepped.items():
            parameter.grad = None
            if self._has_masters:
                masters.round_off(parameter, self._optimizer.state[parameter], half)

    @contextmanager
    def _alone(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Parameters are all that the optimizer has: in backward others have gradients, too."""
        groups = self._optimizer.param_groups
        everything = [group["params"] for group in groups]
        wanted = set(parameters)
        for group in groups:
            group["params"] = [p for p in group["params"] if p in wanted]
        try:
            yield
        finally:
            for group, whole in zip(groups, everything, strict=True):
                group["params"] = whole

    def _state(self, block: Block, name: str) -> dict[str, Any]:
        """Its state as it is in memory; of one that has none, nothing that could be kept."""
        state: dict[str, Any] = self._optimizer.state.get(block.parameters[name], {})
        return state


def _runs(places: dict[str, StatePlace]) -> Iterator[list[str]]:
    """Names of those that lie one behind the other."""
    run: list[str] = []
    for name in sorted(places, key=lambda name: places[name].offset):
        if run and places[run[-1]].end != places[name].offset:
            yield run
            run = []
        run.append(name)
    if run:
        yield run


def _one_behind_the_other(first: Tensor, second: Tensor) -> Tensor | None:
    """Both, if they are parts of one memory and nothing is between them."""
    storage = first.untyped_storage()
    start = int(first.storage_offset())
    if storage.data_ptr() != second.untyped_storage().data_ptr():
        return None
    if start + len(first) != second.storage_offset():
        return None
    both = torch.empty(0, dtype=torch.uint8)
    return both.set_(storage, start, (len(first) + len(second),), (1,))


def _copy_unless_there(
    tensors: dict[str, Tensor], places: dict[str, Place], memory: Tensor
) -> None:
    targets = {key: where.of(memory) for key, where in places.items()}
    moved = {key for key, value in tensors.items() if value.data_ptr() != targets[key].data_ptr()}
    # One that moves may lie where another goes.
    for key, value in [(key, tensors[key].clone()) for key in moved]:
        targets[key].copy_(value)


def is_large(value: Any) -> bool:
    """Whether a part of an optimizer's state is a tensor that is stored, and no counter."""
    return isinstance(value, Tensor) and value.numel() > 1


def _remove_large(state: dict[str, Any]) -> None:
    for key in [key for key, value in state.items() if is_large(value)]:
        del state[key]


def known_parameters(optimizer: Optimizer) -> set[nn.Parameter]:
    """All parameters of an optimizer's groups."""
    return {p for group in optimizer.param_groups for p in group["params"]}
