"""A LightningModule seen as a chain of layers that can be cut between any two of them.

Three ways to have a chain, in this order: the module names it with ``pipeline_layers()``; it is one
of ours, whose decoder is cut between blocks (decoder_chain.py); or all its parameters are in one
``nn.Sequential``. What the user's own step does with the end of the chain stays the user's: on the
last stage the step runs as it is, and where it would call the chain it is given the output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch import Tensor, nn
from typing_extensions import override

from lightning_align._errors import argument_error
from lightning_align.run.rng import fork_generators, seed_torch

WHERE = "PipelineStrategy"


class Step(NamedTuple):
    """A step of the user's module on one micro-batch: ``call(batch, *rest)``.

    Every run of it draws the same: the first stage may run it up to the chain (noise is added to
    the inputs there), and the last one runs it again (the loss asks for the same noise).
    """

    call: Callable[..., Any]
    batch: Any
    rest: tuple[Any, ...]
    seed: int

    def __call__(self) -> Any:
        """Run it."""
        seed_torch(self.seed)
        return self.call(self.batch, *self.rest)


class Chain(ABC):
    """Layers in their order, and how to run a stretch of them.

    Attributes:
        module: The user's module.
        layers: Modules between which the chain may be cut.
        before: Modules that belong to the first layer, such as the embeddings.
        after: Modules that belong to the last layer, such as the head.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        layers: Sequence[nn.Module],
        before: Sequence[nn.Module] = (),
        after: Sequence[nn.Module] = (),
    ) -> None:
        self.module = module
        self.layers = list(layers)
        self.before = list(before)
        self.after = list(after)
        self._refuse_parameters_outside()

    @abstractmethod
    def run(self, begin: int, end: int, received: tuple[Tensor, ...], step: Step) -> Any:
        """Layers ``begin`` to ``end - 1``: a tensor, or a tuple that the next stretch receives."""

    @abstractmethod
    def seam(self, output: Any) -> Any:
        """Context in which the user's step finds ``output`` where it would call the chain."""

    def owned(self, begin: int, end: int) -> list[nn.Module]:
        """The modules whose parameters a stage of these layers needs."""
        first = self.before if begin == 0 else []
        last = self.after if end == len(self.layers) else []
        return [*first, *self.layers[begin:end], *last]

    def close(self) -> None:  # noqa: B027  # most chains change nothing
        """Leave the module as it was found."""

    def _refuse_parameters_outside(self) -> None:
        inside = {
            parameter for part in self.owned(0, len(self.layers)) for parameter in part.parameters()
        }
        outside = [name for name, p in self.module.named_parameters() if p not in inside]
        if outside:
            rule = (
                f"{len(outside)} parameter(s) are in no layer of its chain, first {outside[0]!r}:"
                " no stage would train them"
            )
            way_out = "Make what holds them a layer of pipeline_layers()"
            raise argument_error(WHERE, "model", type(self.module).__name__, rule, way_out)


class LayerChain(Chain):
    """Layers that are called one after the other; a tuple is handed on as arguments.

    Args:
        module: The user's module.
        layers: The chain.
        called: The module that stands for the chain in the user's steps: they call it once.
        call_name: How the user writes that call, for errors.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        layers: Sequence[nn.Module],
        called: nn.Module,
        call_name: str,
    ) -> None:
        super().__init__(module, layers)
        self._called, self._call_name = called, call_name

    @override
    def run(self, begin: int, end: int, received: tuple[Tensor, ...], step: Step) -> Any:
        flow: Any = received if begin else self._first_inputs(step)
        for layer in self.layers[begin:end]:
            flow = layer(*flow) if isinstance(flow, tuple) else layer(flow)
        return flow

    def _first_inputs(self, step: Step) -> tuple[Any, ...]:
        """What the user's step calls the chain with; it gets no further than that call."""
        named = getattr(self.module, "pipeline_inputs", None)
        if named is not None:
            inputs = named(step.batch)
            return inputs if isinstance(inputs, tuple) else (inputs,)

        def reached(*args: Any, **kwargs: Any) -> None:
            raise _Reached(args, kwargs)

        try:
            with (
                fork_generators(self.module.device),  # the layers draw for themselves
                replaced(self._called, "forward", reached),
                replaced(self.module, "log", _ignore),
            ):
                step()
        except _Reached as call:
            if call.keywords:
                rule = f"it must be called without keyword arguments, not with {call.keywords}"
                raise self._error(rule) from None
            return call.inputs
        raise self._error("the step must call it once")

    @contextmanager
    @override
    def seam(self, output: Any) -> Iterator[None]:
        calls = 0

        def forward(*_: Any, **__: Any) -> Any:
            nonlocal calls
            calls += 1
            return output

        with replaced(self._called, "forward", forward):
            yield
        if calls != 1:
            raise self._error(f"the step must call it once, not {calls} times")

    def _error(self, rule: str) -> ValueError:
        name = type(self.module).__name__
        rule = f"its chain is {self._call_name}: {rule}"
        return argument_error(WHERE, "model", name, rule, "Call the chain that way in every step")


class _Reached(BaseException):  # no error: the way out of the user's step
    """The user's step has come to its chain. Not an Exception, so that no step catches it."""

    def __init__(self, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super().__init__()
        self.inputs, self.keywords = inputs, sorted(keywords)


def _ignore(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object an attribute of its own for a while, in place of its class's."""
    attributes = vars(owner)
    before = {key: attributes[key] for key in (name,) if key in attributes}
    attributes[name] = value
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(before)


def layer_chain(module: pl.LightningModule) -> LayerChain:
    """The chain that a module names, or its one ``nn.Sequential``.

    Raises:
        ValueError: If there is none.
    """
    name = type(module).__name__
    if (pipeline_layers := getattr(module, "pipeline_layers", None)) is not None:
        layers = list(pipeline_layers())
        if not layers or not all(isinstance(layer, nn.Module) for layer in layers):
            rule = "its pipeline_layers() must return modules in the order they are called"
            raise argument_error(WHERE, "model", name, rule)
        return LayerChain(module, layers, module, "self(...)")
    trained = {
        child_name: child
        for child_name, child in module.named_children()
        if next(child.parameters(), None) is not None
    }
    if len(trained) == 1:
        ((child_name, child),) = trained.items()
        if isinstance(child, nn.Sequential):
            return LayerChain(module, list(child), child, f"self.{child_name}(...)")
    rule = f"cannot tell the chain of layers that stages are cut from; it holds {sorted(trained)}"
    way_out = (
        "Define pipeline_layers() that returns the modules in their order, or use nn.Sequential"
    )
    raise argument_error(WHERE, "model", name, rule, way_out)
