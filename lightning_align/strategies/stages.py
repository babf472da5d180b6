"""The stages of one rank: modules for torch's pipeline runtime, and their schedules.

A schedule of torch serves one shape, one number of micro-batches and one mode, so each such key has
its own. Shapes between stages are found by running one micro-batch through all stages once per key
(torch would run it again at each change between training and evaluation, and call the user's loss).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from typing_extensions import override

from lightning_align._errors import argument_error
from lightning_align.pipelining.actions import Event
from lightning_align.run.rng import fork_generators, seed_torch
from lightning_align.seeds import derive_seed
from lightning_align.strategies.chain import WHERE, Chain, Step


class Meta(NamedTuple):
    """A tensor that one stage sends to the next."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def like(self) -> Tensor:
        """A tensor without memory; one of floats always carries a gradient, frozen or not."""
        grad = self.dtype.is_floating_point
        return torch.empty(self.shape, dtype=self.dtype, device="meta", requires_grad=grad)


@dataclass
class Work:
    """What the stages of this rank work on, and what they are doing.

    Attributes:
        steps: The user's step for each micro-batch.
        context: Makes the precision plugin's context.
        seed: What the randomness of this batch follows from.
        doing: ``(action, stage, microbatch)``, for errors.
        events: What was run, if a list.
        stages: Those of this rank, for errors.
        device: Where they run.
    """

    steps: list[Step] = field(default_factory=list)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    seed: int = 0
    doing: tuple[str, int, int] | None = None
    events: list[Event] | None = None
    stages: tuple[int, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

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
        if self.events is None:
            yield
            return
        start = self._now()
        yield
        rank = distributed.get_rank()
        self.events.append(Event(rank, kind, stage, microbatch, start, self._now()))

    def prolong(self) -> None:
        """Let the latest action last until now: a loss belongs to the last stage's forward."""
        if self.events:
            self.events[-1] = self.events[-1]._replace(end_s=self._now())

    def _now(self) -> float:
        """Wall clock, which machines agree on, once the device has done what it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.time()


class StageModule(nn.Module):
    """A stretch of the chain, run on micro-batch ``microbatch`` of the work at hand."""

    def __init__(self, chain: Chain, index: int, begin: int, end: int, work: Work) -> None:
        super().__init__()
        self.chain, self.work = chain, work
        self.index, self.begin, self.end = index, begin, end

    @override
    def forward(self, *received: Tensor, microbatch: Tensor) -> Any:
        number = int(microbatch)
        work = self.work
        # Of the micro-batch, not of the order: every schedule draws the same.
        seed_torch(derive_seed(work.seed, number, self.index, "stage"))
        inputs = () if self.begin == 0 else received
        with work.action("F", self.index, number), work.context():
            output = self.chain.run(self.begin, self.end, inputs, work.steps[number])
        return _contiguous(output) if self.end < len(self.chain.layers) else output


def output_metas(output: Any, stage: int, module: nn.Module) -> list[Meta]:
    """What a stage sends on.

    Raises:
        ValueError: If it is anything but tensors.
    """
    tensors = list(output) if isinstance(output, (tuple, list)) else [output]
    for value in tensors:
        if not isinstance(value, Tensor):
            rule = f"stage {stage} must hand on tensors only, and returned {type(value).__name__}"
            way_out = "Let the layer before the cut return a tensor or a tuple of tensors"
            raise argument_error(WHERE, "model", type(module).__name__, rule, way_out)
    return [Meta(tuple(value.shape), value.dtype) for value in tensors]


class StageError(ValueError):
    """The user's code failed in a stage while shapes were found."""


class StageMetas:
    """Finds what the stages send each other for batches of a shape, once per shape."""

    def __init__(self, modules: dict[int, StageModule], num_stages: int, group: Any) -> None:
        self.modules, self.num_stages, self.group = modules, num_stages, group
        self._known: dict[Hashable, list[list[Meta]]] = {}

    def of(self, key: Hashable, device: torch.device) -> list[list[Meta]]:
        """What each stage returns; collective, with one forward of a micro-batch, if unknown.

        Raises:
            ValueError: If a stage hands on anything but tensors, or fails, on all ranks.
        """
        if key not in self._known:
            self._known[key] = self._find(device)
        return self._known[key]

    def _find(self, device: torch.device) -> list[list[Meta]]:
        size = distributed.get_world_size(self.group)
        metas: list[list[Meta]] = []
        for index in range(self.num_stages):
            told: list[Any] = [None]
            if index in self.modules:
                told = [self._run(self.modules[index], metas[-1] if metas else [], device)]
            source = distributed.get_global_rank(self.group, index % size)
            distributed.broadcast_object_list(told, source, group=self.group)
            if isinstance(told[0], ValueError):
                raise told[0]
            metas.append(told[0])
        return metas

    @staticmethod
    def _run(module: StageModule, received: list[Meta], device: torch.device) -> Any:
        inputs = [torch.zeros(meta.shape, dtype=meta.dtype, device=device) for meta in received]
        chain = module.chain
        # The run must leave no trace: not in batch norm's statistics, not in the generators.
        buffers = [
            (buffer, buffer.clone())
            for part in chain.owned(module.begin, module.end)
            for buffer in part.buffers()
        ]
        try:
            with torch.no_grad(), fork_generators(device):
                output = module(*inputs, microbatch=torch.tensor(0))
            return output_metas(output, module.index, chain.module)
        except Exception as error:
            if isinstance(error, ValueError):
                return error
            return StageError(f"stage {module.index}: {type(error).__name__}: {error}")
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _contiguous(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.contiguous()
    return tuple(_contiguous(v) for v in output) if isinstance(output, (tuple, list)) else output
