"""One run of the user's step, in which only the layers of one stage compute.

Positions of the chain follow from the order of calls, so a layer may be there twice:

    position   0 .. begin-2   begin-1         begin .. end-1   end
    returns    a stand-in     what was        what the layer   nothing: the step is left
                              received        computes

Backward ([13] of ``steps.py``) is autograd's within a stage and torch's sending between two:

    stage 0:  step -> layer 0 -> layer 1 ~~~~~> sent         gradient of layer 1's output
    stage 1:                received, a leaf -> _Received -> layer 2 -> layer 3 -> step -> loss
                            its gradient is  <- notes that   <-------------------------   |
                            sent back           it was reached                            v

Each layer draws for itself, seeded by one number that all stages draw in its place. So the masks of
a layer's dropout depend neither on the schedule nor on the cut, and they are the same when
checkpointing calls it again in backward, from the same place of the generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from typing_extensions import override

from lightning_align._compat import torch_modules
from lightning_align._errors import argument_error
from lightning_align.seeds import fork_generators, seed_torch
from lightning_align.strategies.pipeline.trees import Meta, filled, metas_of, tensors_in, version_of

if TYPE_CHECKING:
    from lightning_align.strategies.pipeline.chain import Chain, Step
    from lightning_align.strategies.pipeline.provenance import Provenance

WHERE = "PipelineStrategy"


class ChainError(ValueError):
    """The user's step and its chain do not fit together."""


def chain_error(module: pl.LightningModule, rule: str, way_out: str = "") -> ChainError:
    """The error for a module whose chain breaks a rule."""
    return ChainError(str(argument_error(WHERE, "model", type(module).__name__, rule, way_out)))


class Left(BaseException):  # no error: the way out of the user's step
    """The stage is done with the step. Not an Exception, so that no step catches it."""


@dataclass
class Shapes:
    """What the parts of the chain return, without values.

    Attributes:
        layers: Of each layer, as far as they are known.
        before: Of each call of a module before the first layer.
    """

    layers: list[Any] = field(default_factory=list)
    before: list[Any] = field(default_factory=list)


class Passage:
    """The calls of the chain's modules in one run of a step; see ``Chain.run``."""

    def __init__(
        self,
        chain: Chain,
        begin: int,
        end: int,
        received: Any,
        step: Step,
        shapes: Shapes,
        provenance: Provenance | None,
    ) -> None:
        self.chain, self.step, self.shapes, self.provenance = chain, step, shapes, provenance
        self.begin, self.end, self.received = begin, end, received
        self.device = chain.module.device
        self.position = 0  # of the layer that is due
        self.output: Any = None  # of the layer before it
        self._versions: list[tuple[Tensor, int]] = []
        self._is_inside = False  # of a layer
        self._is_left = False
        self._calls_before = 0

    def layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of the call of a layer."""
        if self._is_inside:
            return torch_modules.call_module(layer, *args, **kwargs)
        position = self.position
        self._check_order(layer)
        if self.provenance is not None and torch_modules.is_in_reentrant_checkpoint():
            rule = f"its step recomputes {self._name()} with use_reentrant=True"
            raise self._error(rule, "Use checkpoint(..., use_reentrant=False)")
        if position >= max(self.begin, 1):  # what comes before is checked by the stage that has it
            self._check_given(args, kwargs)
        if position == self.end:
            self._is_left = True
            raise Left  # [10] out of whatever the user's code has around its layers
        self.position += 1
        if position < self.begin - 1:  # [8]
            torch.randint(2**62, ())  # as where it is computed
            self._returns(filled(self.shapes.layers[position], self._stand_in))
        elif position == self.begin - 1:  # [8], the way that backward comes back by
            torch.randint(2**62, ())
            self._returns(apply_to_collection(self.received, Tensor, self._taken))
        else:  # [9]
            args = self._inputs(args) if position == 0 else args
            self._returns(self._computed(layer, args, kwargs))
        return self.output

    def part_before(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of the call of a module before the first layer."""
        number, self._calls_before = self._calls_before, self._calls_before + 1
        known = self.shapes.before
        if self.begin == 0:
            output = torch_modules.call_module(part, *args, **kwargs)
            if number == len(known):
                known.append(metas_of(output))
            return output
        if self.position > 0 or number >= len(known):
            rule = f"{type(part).__name__} is called again after the first layer of the chain"
            raise self._error(rule, "Name the chain with pipeline_layers(), without that module")
        # In memory of its own: the step may go on with it, up to the first layer, in place.
        return self._marked(filled(known[number], self._whole_stand_in), "an embedding")

    def part_after(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of the call of a module after the last layer."""
        if self.end < len(self.chain.layers):
            rule = f"{type(part).__name__} is called before the last layer of the chain"
            raise self._error(rule, "Name the chain with pipeline_layers(), without that module")
        return torch_modules.call_module(part, *args, **kwargs)

    def check_end(self) -> None:
        """Check that a step that has come to its end has called all layers.

        Raises:
            ValueError: If it has not.
        """
        if self._is_left:
            rule = "its step catches every exception, and a pipeline leaves it by one"
            raise self._error(rule, "Catch Exception, not BaseException")
        if self.position < len(self.chain.layers):
            rule = f"a step must call each of them, and it has not called {self._name()}"
            raise self._error(rule)

    # What a layer is given.

    def _check_order(self, layer: nn.Module) -> None:
        layers, position = self.chain.layers, self.position
        if position < len(layers) and layers[position] is layer:
            return
        listed = layers.count(layer)
        if layers[:position].count(layer) == listed:
            called = self._name(layers.index(layer))
            rule = f"a step must call each of them once, and calls {called} again"
            raise self._error(rule, "List it as often as it is called")
        called, due = self._name(layers.index(layer)), self._name()
        rule = f"a step must call them in their order, and calls {called} where {due} is due"
        raise self._error(rule)

    def _check_given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else next(iter(kwargs.values()), None)
        given, returned = tensors_in(first), self._versions
        own = {id(tensor) for tensor, _ in returned}
        if not given or not all(id(tensor) in own for tensor in given):
            between = f"between {self._name(self.position - 1)} and {self._name()}"
            rule = f"its step computes {between}, of which the next must get the output itself"
            raise self._error(rule, "Make what is computed there a module, and list it")
        if any(version_of(tensor) != version for tensor, version in returned):
            rule = f"its step changes what {self._name(self.position - 1)} has returned in place"
            raise self._error(rule, "Make what changes it a module, and list it")
        if self.provenance is not None and self.position < self.end:
            others = [t for t in tensors_in((args, kwargs)) if id(t) not in own]
            if (origin := self.provenance.of(others)) is not None:
                rule = f"{self._name()} is given something that was computed from {origin}"
                way_out = "Let each layer hand it on, in a tuple with its output"
                raise self._error(rule, way_out)

    def _inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.chain.inputs is None:
            return args
        inputs = self.chain.inputs(self.step.batch)
        return inputs if isinstance(inputs, tuple) else (inputs,)

    # What it returns.

    def _computed(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._is_inside = True  # a layer that calls another one of the chain calls it as usual
        try:
            with self._unseen(), drawing_for_itself(self.device):
                output = torch_modules.call_module(layer, *args, **kwargs)
        finally:
            self._is_inside = False
        if self.position > len(self.shapes.layers):
            self.shapes.layers.append(metas_of(output))
        return output

    def _returns(self, output: Any) -> None:
        self.output = output
        self._versions = [(tensor, version_of(tensor)) for tensor in tensors_in(output)]
        if self.position < len(self.chain.layers):
            self._marked(output, self._name(self.position - 1))
        elif self.provenance is not None:
            self.provenance.clear(output)

    def _unseen(self) -> AbstractContextManager[None]:
        return nullcontext() if self.provenance is None else self.provenance.paused()

    def _marked(self, output: Any, origin: str) -> Any:
        if self.provenance is not None:
            self.provenance.mark(output, origin)
        return output

    def _taken(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        apply: Any = _Received.apply
        output: Tensor = apply(tensor, partial(self.chain.reached.add, self.begin))
        return output

    def _stand_in(self, meta: Meta) -> Tensor:
        """Shape, dtype and device of an output, and one value for all: NaN, which shows."""
        return self._value(meta).expand(meta.shape)

    def _whole_stand_in(self, meta: Meta) -> Tensor:
        return self._value(meta).repeat(meta.shape)

    def _value(self, meta: Meta) -> Tensor:
        value = torch.nan if meta.dtype.is_floating_point else 0
        return torch.full((), value, dtype=meta.dtype, device=self.device)

    # Words.

    def _name(self, position: int | None = None) -> str:
        position = self.position if position is None else position
        layers = self.chain.layers
        if position >= len(layers):
            return "the end"
        return f"layer {position} ({type(layers[position]).__name__})"

    def _error(self, rule: str, way_out: str = "") -> ChainError:
        rule = f"its chain has {len(self.chain.layers)} layers: {rule}"
        way_out = way_out or "List its layers as the step calls them"
        return chain_error(self.chain.module, rule, way_out)


class _Received(torch.autograd.Function):
    """The same memory, as the output of a layer: a layer that works in place may follow."""

    @staticmethod
    @override
    def forward(ctx: Any, tensor: Tensor, note: Callable[[], None]) -> Tensor:
        ctx.note = note
        return tensor.data  # no view of the leaf, which must not be changed in place

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.note()  # [13]
        return gradient, None


@contextmanager
def drawing_for_itself(device: torch.device) -> Iterator[None]:
    """Around a layer: it draws from a seed of its own, and takes one number from the generators."""
    seed = int(torch.randint(2**62, ()))
    if device.type != "cpu":
        with fork_generators(device):
            seed_torch(seed)
            yield
        return
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
