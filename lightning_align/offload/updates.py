"""The optimizer's step: block by block, in the middle of backward or when it is called.

Embedding, head and whatever else stays in memory is updated last, from the gradients that autograd
has left in ``p.grad``; so is all else where a user's code looks for gradients there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_align.offload import masters
from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.gradients import GradientSums
from lightning_align.offload.late_updates import LateUpdates
from lightning_align.offload.optimizer_stream import (
    OptimizerStream,
    StepsParameters,
    expected_state_bytes,
    is_large,
)
from lightning_align.offload.prefetch import Residents
from lightning_align.offload.store import ShardStore
from lightning_align.offload.whole_states import gather_states, keep_own_states


class Updates:
    """Steps an optimizer whose state is stored.

    Args:
        optimizer: The user's.
        store: Files of all blocks; room for the state is reserved there.
        residents: What is in memory.
        gradients: Of the open window.
        pool: Memory for states.
        group_bytes: Optimizer state of a group.
        groups: Groups that are in memory at a time.
        fresh: Whether the optimizer has no state yet; otherwise what is stored is its.
        has_masters: Whether parameters are stepped in fp32, from which they are then rounded.

    Attributes:
        late: Updates of the step before that are still to be done.
        state_bytes: Block -> bytes of its state, as far as they are known before the first step.

    Raises:
        OSError: If there is no room.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        store: ShardStore,
        residents: Residents,
        gradients: GradientSums,
        pool: BufferPool,
        group_bytes: int,
        groups: int = 2,
        *,
        fresh: bool,
        has_masters: bool = False,
    ) -> None:
        self._optimizer, self._store, self._ranks = optimizer, store, store.ranks
        self._residents, self._gradients = residents, gradients
        self._blocks = [block for block in store.blocks.values() if not block.read_only]
        self._has_masters = has_masters
        if fresh:
            store.forget_states()
        self.state_bytes = {
            name: expected_state_bytes(optimizer, block, has_masters=has_masters)
            for name, block in store.blocks.items()
        }
        store.allocate(self.state_bytes)
        self.late = LateUpdates(
            optimizer, self._update_summed, self._foresee, self._gradients.clear
        )
        residents.fetched = self.late.do
        store.looked_at = self.late.finish
        self._stream = OptimizerStream(
            optimizer, store, pool, group_bytes, groups, has_masters=has_masters
        )

    @torch.no_grad()
    def step(self) -> None:
        """Update what has gradients and was not updated in backward; the window is over.

        Blocks that come and go are updated when they come next, where one rank has them all.
        """
        self.late.finish()
        everything = [p for block in self._blocks for p in block.parameters.values()]
        may_step = True
        if isinstance(self._optimizer, StepsParameters):
            may_step = self._optimizer.begin_step(self._gradients.norms_of(everything))
        self._residents.begin("update")
        waiting = [
            block
            for block in (self._blocks if may_step else ())
            if self._gradients.names(block) and not self._gradients.is_used(block)
        ]
        late = [b for b in waiting if b.comes_and_goes] if self._ranks.size == 1 else []
        at_once = [block for block in waiting if block not in late]
        for number, block in enumerate(at_once):
            following = at_once[number + 1 : number + 2]
            self._update_summed(block, "update", partial(self._foresee, following))
        for block in self._blocks if may_step else ():
            if block.gradients_stay or self._gradients.stay:
                self.update_from_grad(block, "update")
        if not self._gradients.stay:
            for parameter in everything:
                parameter.grad = None
        if late:
            self._gradients.norms.clear()
            self.late.wait(late)
            self._foresee(late[:1])  # until the next forward nothing else is read
        else:
            self._gradients.clear()

    @torch.inference_mode(False)  # a validation may come before the next forward of training
    @torch.no_grad()
    def _update_summed(self, block: Block, phase: str, meanwhile: Callable[[], None]) -> None:
        self._gradients.used(block)  # also where the update is interrupted
        self.update(block, self._gradients.take(block), phase, meanwhile)

    def _foresee(self, blocks: list[Block]) -> None:
        """Begin to read what the updates of blocks will need, but for their parameters."""
        for block in blocks:
            self._gradients.foresee(block)
            self._residents.foresee_section(block)
            names = self._gradients.names(block)
            self._stream.foresee(block, names.__contains__, beside_another=True)

    def foresee(self, block: Block) -> None:
        """Begin to read what the update of a block will need whose gradients are being computed."""
        if block.trainable:
            self._stream.foresee(block, block.trainable.__contains__)

    def update(
        self,
        block: Block,
        sums: Tensor,
        phase: str,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Step one block and write it.

        Args:
            block: Which one.
            sums: Its gradients.
            phase: In which the block is fetched.
            meanwhile: Called when all that this update reads is being read.
        """
        names = self._gradients.names(block) & block.pieces.keys()
        self._stream.foresee(block, names.__contains__)  # before other blocks are
        section = self._residents.take_section(block, phase)
        gradients = {name: block.pieces[name].place.of(sums) for name in names}
        for gradient in gradients.values():
            self._gradients.edit(gradient)
        self._stream.update(block, section, gradients.get, meanwhile)
        self._residents.section_updated(block)
        block.note_stored()
        self._gradients.used(block)

    def update_from_grad(self, block: Block, phase: str) -> None:
        """Step one block whose gradients have stayed in ``p.grad``, and write it.

        Args:
            block: Which one.
            phase: In which the block is fetched.
        """
        gradients = block.take_gradients()
        if gradients:
            here = self._residents.place.receive(block, gradients)
            section = self._residents.take_section(block, phase)
            pieces = {n: p.of_whole(here[n]) for n, p in block.pieces.items() if n in here}
            self._stream.update(block, section, pieces.get)
            self._residents.section_updated(block)
            block.note_stored()
        if self._gradients.stay:
            for name, gradient in gradients.items():
                block.parameters[name].grad = gradient

    def forget_state(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let the optimizer begin anew for some parameters."""
        self.late.finish()
        dropped = set(parameters)
        for parameter in dropped:
            self._optimizer.state.pop(parameter, None)
        for block in self._blocks:
            for name, parameter in block.parameters.items():
                if parameter in dropped:
                    self._store.forget_state(block.name, name)

    def state(self) -> dict[str, Any]:
        """The optimizer's whole state, in memory or as files show it; what is shown stays.

        Of several ranks the first has copies that are set aside, and others have nothing;
        collective.
        """
        if self._ranks.size == 1:
            return self.own_state()
        for block in self._blocks:
            self._stream.show(block)
        return self._gathered_state()

    def own_state(self) -> dict[str, Any]:
        """What this rank has of the optimizer's state, in the same way."""
        for block in self._blocks:
            self._stream.show(block)
        state = self._optimizer.state_dict()
        in_order = sorted(state["state"].items())  # not as blocks were stepped
        state = {**state, "state": {key: dict(value) for key, value in in_order}}
        for block in self._blocks:
            self._stream.drop(block)
        return state

    def outlined_state(self) -> dict[str, Any]:
        """The same as ``linked`` links it: on each rank what it has, on rank 0 all that is small.

        Collective.
        """
        for block in self._blocks:
            self._stream.outline(block)
        state = self._optimizer.state_dict()
        own = {number: dict(entry) for number, entry in state["state"].items()}
        for block in self._blocks:
            self._stream.drop(block)
        small = {
            number: {key: value for key, value in entry.items() if not is_large(value)}
            for number, entry in own.items()
        }
        for others in self._ranks.of_all("the small states", small):
            for number, entry in others.items():
                own[number] = {**entry, **own.get(number, {})}
        return {**state, "state": dict(sorted(own.items()))}

    def _gathered_state(self) -> dict[str, Any]:
        own: Any = self._optimizer.state
        whole: dict[nn.Parameter, dict[str, Any]] = {}
        for block in self._blocks:
            states = gather_states(self._ranks, block, own)
            self._stream.drop(block)
            large = [(p, k) for p, state in states.items() for k, v in state.items() if is_large(v)]
            copies = self._store.set_aside([[states[p][key]] for p, key in large])
            for (parameter, key), copy in zip(large, copies, strict=True):
                states[parameter][key] = copy
            whole.update(states)
        small = {parameter: dict(state) for parameter, state in own.items()}
        own.clear()
        own.update(whole)
        state = self._optimizer.state_dict()
        own.clear()
        own.update(small)
        in_order = {key: dict(value) for key, value in sorted(state["state"].items())}
        return {**state, "state": in_order} if self._ranks.rank == 0 else {}

    def load(self, state: dict[str, Any], blocks: Iterable[Block] | None = None) -> None:
        """Store an optimizer's whole state.

        Args:
            state: As ``state_dict()`` of it.
            blocks: Of which there is something in it; None means all.
        """
        self._take(state)
        self.put_state(blocks)

    @torch.no_grad()
    def take_back(self, values: Mapping[nn.Parameter, Tensor], state: dict[str, Any]) -> None:
        """Store what this rank has had of parameters and of the optimizer's state; collective.

        Args:
            values: From ``WholeValues.own``; others stay.
            state: From ``own_state``.
        """
        self.late.finish()
        self._take(state, is_own=True)
        for block in self._blocks:
            self._store.settle(block.name)  # its memory may still be on its way to the disk
            section = self._residents.take_section(block, "restore")
            for name, piece in block.pieces.items():
                if (value := values.get(block.parameters[name])) is not None:
                    piece.place.of(section).copy_(value)
            self._stream.save(block)
            self._store.write(block.name, section)
            self._store.update_done(block.name)
            self._residents.section_updated(block)
            block.note_stored()

    def resume(self, state: dict[str, Any]) -> None:
        """Take up the optimizer's state of a commit, whose large tensors stay in their files.

        Args:
            state: Its ``state_dict()`` without them.
        """
        if self._ranks.size > 1:  # a class asks for whole tensors, and here are parts
            with self._residents.in_host_memory():
                Optimizer.load_state_dict(self._optimizer, state)
            return
        numbers = {p: number for number, p in self._numbered(state).items()}
        shown = {number: dict(values) for number, values in state["state"].items()}
        for block in self._blocks:
            for name, stored in self._store.states[block.name].items():
                number = numbers.get(block.parameters[name])
                for key, place in stored.tensors.items():
                    nothing = torch.zeros((), dtype=place.dtype).expand(place.shape)
                    shown.setdefault(number, {})[key] = nothing
        self._take({**state, "state": shown})
        for block in self._blocks:
            self._stream.drop(block)

    def _take(self, state: dict[str, Any], *, is_own: bool = False) -> None:
        """Let the optimizer load a state, in the kinds of numbers that it has.

        One that is this rank's own is in these, and in pieces where a class asks for whole tensors.
        """
        known = masters.without_masters(state["state"])
        numbered = self._numbered(state)
        as_it_is = is_own or self._has_masters
        given = {**state, "state": masters.outlines(known, numbered) if as_it_is else known}
        with self._residents.in_host_memory():  # which is where the optimizer steps
            if is_own and self._ranks.size > 1:
                Optimizer.load_state_dict(self._optimizer, given)
            else:
                self._optimizer.load_state_dict(given)
        if not as_it_is:
            return
        had = {number: p for number, p in numbered.items() if number in state["state"]}
        found = {number: self._optimizer.state[p] for number, p in had.items()}
        masters.put_back(state["state"], found)

    def _numbered(self, state: dict[str, Any]) -> dict[int, nn.Parameter]:
        groups = zip(state["param_groups"], self._optimizer.param_groups, strict=False)
        pairs = (zip(packed["params"], own["params"], strict=False) for packed, own in groups)
        return {number: parameter for pair in pairs for number, parameter in pair}

    @torch.no_grad()
    def put_state(self, blocks: Iterable[Block] | None = None) -> None:
        """Store what ``optimizer.load_state_dict`` has brought into memory.

        Args:
            blocks: Of which ones; None means all.
        """
        states: Any = self._optimizer.state
        for block in self._blocks if blocks is None else blocks:
            memory = self._residents.values(block, "values")
            self._store.settle(block.name)
            if self._ranks.size > 1:
                keep_own_states(block, states)
            self._stream.save(block)
            self._store.write(block.name, memory[block.section])
            self._store.update_done(block.name)
