"""The stages of one rank, as modules for torch's pipeline runtime, and what they hand on.

A schedule of torch serves one shape, one number of micro-batches and one mode, so each such key has
its own. What stages hand on is found by running one micro-batch through all of them once per key
(torch would run it again at each change between training and evaluation). That run also checks that
the step and the chain fit together, and is undone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from typing_extensions import override

from lightning_align.pipelining.actions import Event
from lightning_align.seeds import fork_generators
from lightning_align.strategies.pipeline.chain import Chain, ChainError, Step, chain_error, quiet
from lightning_align.strategies.pipeline.passage import Shapes
from lightning_align.strategies.pipeline.provenance import Provenance
from lightning_align.strategies.pipeline.step_attributes import StepAttributes
from lightning_align.strategies.pipeline.trees import Meta, Unknown, filled, leaves, tensors_in


@dataclass
class BatchInProgress:
    """The batch that the stages of this rank run, and what they are at.

    Attributes:
        steps: The user's step for each micro-batch.
        conclude: Called on the last stage with what runs the step and the number of the
            micro-batch; returns what is propagated back.
        shapes: What the parts of the chain return for these micro-batches.
        context: Makes the precision plugin's context.
        seed: What the randomness of this batch follows from.
        doing: ``(action, stage, microbatch)``, for errors.
        events: What was run, if a list.
        stages: Those of this rank, for errors.
        device: Where they run.
        busy_s: Seconds of forward and of backward so far, ``"F"`` and ``"B"``; of a device that
            computes while the next is prepared only while events are noted.
    """

    steps: list[Step] = field(default_factory=list)
    conclude: Callable[[Callable[[], Any], int], Tensor] | None = None
    shapes: Shapes = field(default_factory=Shapes)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    seed: int = 0
    doing: tuple[str, int, int] | None = None
    events: list[Event] | None = None
    stages: tuple[int, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    busy_s: dict[str, float] = field(default_factory=lambda: {"F": 0.0, "B": 0.0})

    @property
    def place(self) -> str:
        """What this rank was at, in words."""
        place = f"rank {distributed.get_rank()}"
        if self.doing is None:
            stages = ", ".join(map(str, self.stages))
            return f"{place}, stage {stages}, before its first micro-batch"
        kind, stage, number = self.doing
        words = {"F": "forward", "B": "backward"}
        return f"{place}, stage {stage}, {words[kind]} of micro-batch {number}"

    @contextmanager
    def action(self, kind: str, stage: int, microbatch: int) -> Iterator[None]:
        """Around an action; where it raises, ``doing`` keeps saying what it was."""
        self.doing = (kind, stage, microbatch)
        if not self.is_timed:
            yield
            return
        start = self._now()
        yield
        end = self._now()
        self.busy_s[kind] += end - start
        if self.events is not None:
            self.events.append(Event(distributed.get_rank(), kind, stage, microbatch, start, end))

    @property
    def is_timed(self) -> bool:
        """Whether actions have ended when they return, so that their times are known."""
        return self.events is not None or self.device.type == "cpu"

    def _now(self) -> float:
        """Wall clock, which machines agree on, once the device has done what it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.time()


class StageModule(nn.Module):
    """A stretch of the chain, run on micro-batch ``microbatch`` of the batch in progress."""

    def __init__(
        self, chain: Chain, index: int, begin: int, end: int, current: BatchInProgress
    ) -> None:
        super().__init__()
        self.chain, self.current = chain, current
        self.index, self.begin, self.end = index, begin, end

    @property
    def is_last(self) -> bool:
        """Whether it runs the user's step to its end."""
        return self.end == len(self.chain.layers)

    def parameters_here(self) -> Iterator[nn.Parameter]:
        """Those of its layers."""
        for part in self.chain.owned(self.begin, self.end):
            yield from part.parameters()

    @override
    def forward(self, *received: Tensor, microbatch: Tensor) -> Any:
        # [6] Every rank has the batch, so torch hands on numbers, and what the stage before sent.
        number, current = int(microbatch), self.current
        run = partial(self.run, received if self.begin else (), number, current.shapes)
        with current.action("F", self.index, number):
            if self.is_last:
                assert current.conclude is not None
                return current.conclude(run, number)
            # What the step logs before its first layer it logs on the last stage, too: once counts.
            with quiet(self.chain.module), current.context():
                tensors = tuple(tensor.contiguous() for tensor in tensors_in(run()))
            self._check_shapes(tensors, number)
            return tensors

    def _check_shapes(self, tensors: Sequence[Tensor], number: int) -> None:
        known = [m for m in leaves(self.current.shapes.layers[self.end - 1]) if isinstance(m, Meta)]
        ours = [Meta(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        if ours != known:
            sizes, first = ([tuple(meta.shape) for meta in metas] for metas in (ours, known))
            rule = f"stage {self.index} hands on tensors of {sizes} for micro-batch {number}, and"
            rule += f" of {first} for the first one: those of a batch must be alike"
            way_out = "Leave rows out, and shorten them, in the collate function or after the chain"
            raise chain_error(self.chain.module, rule, way_out)

    def run(
        self,
        received: Sequence[Tensor],
        number: int,
        shapes: Shapes,
        provenance: Provenance | None = None,
    ) -> Any:
        """The user's step with the layers of this stage; see ``Chain.run``."""
        tensors = iter(received)
        handed_on = (
            filled(shapes.layers[self.begin - 1], lambda _: next(tensors)) if self.begin else None
        )
        step = self.current.steps[number]
        return self.chain.run(self.begin, self.end, handed_on, step, shapes, provenance)


class StageError(ValueError):
    """The user's code failed in a stage while shapes were found."""


class StageMetas:
    """Finds what the parts of the chain return for batches of a shape, once per shape."""

    def __init__(self, modules: dict[int, StageModule], num_stages: int, group: Any) -> None:
        self.modules, self.num_stages, self.group = modules, num_stages, group
        self._known: dict[Hashable, tuple[Shapes, list[list[Meta]]]] = {}

    def of(self, key: Hashable, device: torch.device) -> tuple[Shapes, list[list[Meta]]]:
        """All shapes, and what each stage hands on; collective, with one forward, if unknown.

        Raises:
            ValueError: If a stage hands on anything but tensors, the step does not call its chain
                as one, or it fails, on all ranks.
        """
        # [4] torch finds them by a forward of its own, at each change from training to evaluation.
        if key not in self._known:
            self._known[key] = self._find(device)
        return self._known[key]

    def _find(self, device: torch.device) -> tuple[Shapes, list[list[Meta]]]:
        size = distributed.get_world_size(self.group)
        # Stage by stage, since each needs what the one before it has found; an error is handed on
        # like a result, so that all ranks raise it.
        shapes, handed_on = Shapes(), list[list[Meta]]()
        for index in range(self.num_stages):
            found: list[Any] = [None]
            if index in self.modules:
                found = [_rehearsed(self.modules[index], shapes, device)]
            source = distributed.get_global_rank(self.group, index % size)
            distributed.broadcast_object_list(found, source, group=self.group)
            if isinstance(found[0], ValueError):
                raise found[0]
            shapes, metas = found[0]
            handed_on.append(metas)
        return shapes, handed_on


def _rehearsed(module: StageModule, shapes: Shapes, device: torch.device) -> Any:
    """What a stage's modules and those before it return, and what it hands on; or an error."""
    received = []
    if module.begin:
        metas = [m for m in leaves(shapes.layers[module.begin - 1]) if isinstance(m, Meta)]
        received = [torch.zeros(meta.shape, dtype=meta.dtype, device=device) for meta in metas]
    try:
        # The run must leave no trace: not in batch norm's statistics, not in the generators.
        attributes = StepAttributes(module.chain.module)
        with torch.no_grad(), fork_generators(device), attributes.untouched():
            _run_checked(module, received, shapes)
        loss = [Meta((), torch.float32)]
        return shapes, loss if module.is_last else _handed_on(module, shapes)
    except ChainError as error:
        return error
    except Exception as error:
        return StageError(f"stage {module.index}: {type(error).__name__}: {error}")


def _run_checked(module: StageModule, received: list[Tensor], shapes: Shapes) -> None:
    user = module.chain.module

    def refuse(origin: str, what: str = "a value that the step asks for in Python") -> None:
        rule = f"{what} depends on the output of {origin}, and only the last layer's may"
        way_out = "Let the layers hand it on, each in a tuple with its output"
        raise chain_error(user, rule, way_out)

    def check(value: Any, what: str) -> None:
        if (origin := provenance.of(value)) is not None:
            refuse(origin, what)
        if any(tensor.is_meta for tensor in tensors_in(value)):
            rule = f"{what} is made of weights of another stage, whose values are on another rank"
            raise chain_error(user, rule, "Let weights be used by the layers that hold them only")

    def log(name: str, value: Any, *_: Any, **__: Any) -> None:
        check(value, f"what is logged as {name!r}")

    provenance = Provenance(refuse)
    with quiet(user, log), module.current.context(), provenance:
        result = module.run(received, 0, shapes, provenance)
    if module.is_last:
        check(result, "what the step returns")


def _handed_on(module: StageModule, shapes: Shapes) -> list[Meta]:
    metas = list(leaves(shapes.layers[module.end - 1]))
    for meta in metas:
        if meta is not None and not isinstance(meta, Meta):
            kind = meta.kind if isinstance(meta, Unknown) else type(meta).__name__
            rule = f"stage {module.index} must hand on tensors only, and returned {kind}"
            way_out = "Let the layer before the cut return a tensor or a tuple of tensors"
            raise chain_error(module.chain.module, rule, way_out)
    return [meta for meta in metas if meta is not None]
