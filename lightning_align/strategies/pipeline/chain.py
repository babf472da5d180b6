"""A LightningModule seen as a chain of layers that can be cut between any two of them.

The chain is whatever the user's step calls: on every stage the step runs as it is, and only the
layers know where they are. A micro-batch on the middle one of three stages (``passage.py``):

    the step:   prepares, calls   layer 0   layer 1 | layer 2   layer 3 | layer 4 ...  loss
    on stage 1:                   a stand-  what    | computed          | the step
                                  in        stage 0 |                   | is left; what layer 3
                                            has sent|                   | returned is sent on

So masks, position ids and keyword arguments are made where they are needed, by the user's own code.
The last stage runs the step to its end. This holds if each layer is given what the one before it
has returned, itself, and if nothing but the last layer's output goes on to the loss: ``passage.py``
checks the former at every call, ``provenance.py`` the latter at set-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from traceback import clear_frames
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch import nn

from lightning_align._compat import torch_modules
from lightning_align.layers.surgery import replaced
from lightning_align.run.protocols import NamesInputs
from lightning_align.seeds import seed_torch
from lightning_align.strategies.pipeline.absent import AbsentParameter
from lightning_align.strategies.pipeline.passage import (
    WHERE,
    ChainError,
    Left,
    Passage,
    Shapes,
    chain_error,
    drawing_for_itself,
)

__all__ = ["WHERE", "Chain", "ChainError", "Step", "chain_error"]


class Step(NamedTuple):
    """A step of the user's module on one micro-batch: ``call(batch, *rest)``.

    Every run of it draws the same, on all stages: the first may add noise to its inputs, for which
    the loss asks on the last.
    """

    call: Callable[..., Any]
    batch: Any
    rest: tuple[Any, ...]
    seed: int

    def __call__(self) -> Any:
        """Run it."""
        seed_torch(self.seed)
        return self.call(self.batch, *self.rest)


class Chain:
    """Layers in the order in which a step calls them, and how to run a stretch of them.

    Parameters that belong to no layer are on every rank.

    Args:
        module: The user's module.
        layers: Modules between which the chain may be cut; one that is called twice is there twice.
        before: Modules that are called before the first layer and go with it, such as embeddings.
        after: Modules that are called after the last layer and go with it, such as the head.

    Attributes:
        inputs: What the module says its first layer is called with, as a function of a batch.
        reached: First layers of the stages to whose input backward has come, in this process.

    Raises:
        ValueError: If a part of the module is compiled.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        layers: Sequence[nn.Module],
        before: Sequence[nn.Module] = (),
        after: Sequence[nn.Module] = (),
    ) -> None:
        self.module = module
        self.inputs = module.pipeline_inputs if isinstance(module, NamesInputs) else None
        self.layers = list(layers)
        self.before = list(before)
        self.after = list(after)
        self.reached: set[int] = set()
        self._passage: Passage | None = None
        self._is_working = False
        refuse_compiled(module)
        self._intercepted: list[nn.Module] = []
        for layer in dict.fromkeys(self.layers):
            self._intercept(layer, Passage.layer)
        for part in self.before:
            self._intercept(part, Passage.part_before)
        for part in self.after:
            self._intercept(part, Passage.part_after)

    def owned(self, begin: int, end: int) -> list[nn.Module]:
        """The modules whose parameters a stage of these layers needs."""
        first = self.before if begin == 0 else []
        last = self.after if end == len(self.layers) else []
        return [*first, *self.layers[begin:end], *last]

    def run(
        self,
        begin: int,
        end: int,
        received: Any,
        step: Step,
        shapes: Shapes,
        provenance: Any = None,
    ) -> Any:
        """Run a step with layers ``begin`` to ``end - 1``, and no others.

        Args:
            begin: First layer.
            end: Where the step is left; after the last layer it runs to its end.
            received: What the layer before ``begin`` has returned.
            step: The user's step.
            shapes: What the layers before that return; what is run here is entered.
            provenance: Follows what is computed between layers, if it is to be checked.

        Returns:
            What the last of the layers returned; after the last layer, what the step returned.

        Raises:
            ValueError: If the step does not call the layers as a chain.
        """
        passage = Passage(self, begin, end, received, step, shapes, provenance)
        self._passage = passage
        try:
            result = step()
        except Left as left:
            clear_frames(left.__traceback__)  # contexts that generators hold open end now
            return passage.output
        finally:
            self._passage = None
        passage.check_end()
        return result

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around a batch: layers that are called outside of ``run`` are called by backward."""
        self._is_working = True
        try:
            yield
        finally:
            self._is_working = False

    def close(self) -> None:
        """Leave the module as it was found."""
        for part in self._intercepted:
            torch_modules.intercept_calls(part, None)
        self._intercepted.clear()

    def _intercept(self, part: nn.Module, enter: Callable[..., Any]) -> None:
        def called(*args: Any, **kwargs: Any) -> Any:
            if self._passage is not None:
                return enter(self._passage, part, args, kwargs)
            if any(isinstance(parameter, AbsentParameter) for parameter in part.parameters()):
                rule = f"{type(part).__name__} of another stage is called outside of a step, and"
                rule += " this rank has no weights for it"
                way_out = "Call the model in the steps only, or load a checkpoint for it"
                raise chain_error(self.module, rule, way_out)
            if self._is_working:  # recomputed for backward, from the same place of the generators
                with drawing_for_itself(self.module.device):
                    return torch_modules.call_module(part, *args, **kwargs)
            return torch_modules.call_module(part, *args, **kwargs)

        torch_modules.intercept_calls(part, called)
        self._intercepted.append(part)


def refuse_compiled(module: pl.LightningModule) -> None:
    """Refuse what torch has compiled: a layer could not be told from the next one.

    Raises:
        ValueError: If a part of the module is.
    """
    compiled = [name for name, part in module.named_modules() if torch_modules.is_compiled(part)]
    if compiled or getattr(module, "_compiler_ctx", None) is not None:
        subject = f"its part {compiled[0]!r}" if compiled and compiled[0] else "it"
        rule, way_out = f"{subject} is compiled", "Pass the module from before torch.compile"
        raise chain_error(module, rule, way_out)


@contextmanager
def quiet(module: pl.LightningModule, log: Callable[..., None] | None = None) -> Iterator[None]:
    """Around a step of which nothing counts: what it logs goes nowhere.

    Args:
        module: The user's module.
        log: Gets the calls of ``self.log``.
    """
    with replaced(module, "log", log or (lambda *_, **__: None)):
        yield
