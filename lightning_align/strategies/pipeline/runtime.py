"""Runs batches through the stages of this rank: torch's schedules forward and backward, or forward.

Micro-batches themselves never go through torch's splitting: a schedule is given their numbers, and
a stage looks up what it needs. Every rank has the whole batch. The clock of a schedule, and what a
stage does in one of its places, is drawn in ``steps.py``, whose numbers are those of comments here.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed
from torch.distributed.pipelining.schedules import get_schedule_class

from lightning_align._compat.torch_pipelining import LeanStage, load_schedule_csv
from lightning_align._errors import argument_error
from lightning_align.pipelining.actions import Event
from lightning_align.strategies.failure import pipeline_error
from lightning_align.strategies.pipeline.chain import Chain
from lightning_align.strategies.pipeline.stages import BatchInProgress, StageMetas, StageModule
from lightning_align.strategies.pipeline.trees import Meta

# name -> whether a rank may hold several stages
SCHEDULES = {"GPipe": False, "1F1B": False, "Interleaved1F1B": True}
_FALLBACKS = {"1F1B": "GPipe", "Interleaved1F1B": "LoopedBFS"}
_KEPT_SCHEDULES = 8  # batches of many lengths would make many

Conclude = Callable[[Callable[[], Any], int], Tensor]


class Runtime:
    """The pipeline of one rank.

    Args:
        chain: The user's module as a chain.
        stretches: ``(begin, end)`` of each stage's layers, for all stages.
        schedule: torch's name of the schedule.
        schedule_csv: File with the schedule's actions; None takes torch's.
        group: The ranks of the pipeline.
        device: Where this rank computes.
        record_timeline: Whether to note when actions run.

    Attributes:
        current: The batch that the stages are at; ``running.py`` fills it.
        schedule_in_use: Name of the schedule that the last batch ran under.
        timeline: Actions of this rank in the last training batch, if they are recorded.
        waited_s: Seconds of training batches, so far, in which none of this rank's actions ran.
    """

    def __init__(
        self,
        chain: Chain,
        stretches: Sequence[tuple[int, int]],
        schedule: str,
        schedule_csv: str | None,
        group: distributed.ProcessGroup,
        device: torch.device,
        *,
        record_timeline: bool = False,
    ) -> None:
        self._chain = chain
        self.current = BatchInProgress(device=device)
        self.record_timeline = record_timeline
        self.timeline: list[Event] = []
        self.waited_s = 0.0
        self.schedule, self.schedule_csv = schedule, schedule_csv
        self.schedule_in_use = schedule
        self.group, self.device = group, device
        rank, size = distributed.get_rank(group), distributed.get_world_size(group)
        self.num_stages = len(stretches)
        here = range(rank, self.num_stages, size)
        self.modules = {n: StageModule(chain, n, *stretches[n], self.current) for n in here}
        self.current.stages = tuple(self.modules)
        self._metas = StageMetas(self.modules, self.num_stages, group)
        self._made: OrderedDict[Hashable, Any] = OrderedDict()
        self._warned: set[str] = set()
        self._unreached: dict[Hashable, int] = {}

    @property
    def has_first(self) -> bool:
        """Whether stage 0 is here."""
        return 0 in self.modules

    @property
    def has_last(self) -> bool:
        """Whether the last stage is here, which alone runs steps to their end."""
        return self.num_stages - 1 in self.modules

    def train(self, key: Hashable, conclude: Conclude) -> None:
        """Forward and backward of the batch in progress.

        Args:
            key: What two batches share if one schedule serves both.
            conclude: Called on the last stage with what runs the step to its end and the number of
                the micro-batch; returns what is propagated back.
        """
        count = len(self.current.steps)
        self.current.shapes, metas = self._metas.of(("train", key, count), self.device)  # [4]
        self.schedule_in_use, schedule = self._fetch(
            ("train", key, count), lambda: self._make_schedule(metas, count)
        )
        self.current.conclude = conclude
        self._chain.reached.clear()
        # [5] Only the first stage is given an input by torch, and only the last one asks for a
        # target; the keyword argument comes to all.
        numbers = torch.arange(count)
        inputs = (numbers,) if self.has_first else ()
        with self._named_failures(), self._recorded(), self._waits_counted():
            schedule.step(*inputs, target=numbers, microbatch=numbers, return_outputs=False)
        self._drop_gradients_of_nothing(("train", key, count))

    def _drop_gradients_of_nothing(self, key: Hashable) -> None:
        """Where a layer detaches its input, stages before it have no gradient, as in one process.

        They are sent zeros, by which an optimizer with weight decay would move their weights. Which
        stages backward comes to is found out once for a key; collective.
        """
        stages = self.modules.values()
        # [14] A stage's backward is called in any case; whether it came from the loss is seen in
        # whether the stage behind it passed something to its input, [13].
        if key not in self._unreached:
            reached = torch.ones(self.num_stages, dtype=torch.int32, device=self.device)
            for stage in stages:
                reached[stage.index] = stage.index == 0 or stage.begin in self._chain.reached
            distributed.all_reduce(reached, distributed.ReduceOp.MIN, group=self.group)
            unreached = (reached == 0).nonzero().flatten().tolist()
            self._unreached[key] = max(unreached, default=0)
        first = self._unreached[key]  # of the stages that have gradients
        if first == 0:
            return
        chain = self._chain
        kept = {p for stage in stages if stage.index >= first for p in stage.parameters_here()}
        layers = {p for part in chain.owned(0, len(chain.layers)) for p in part.parameters()}
        for parameter in chain.module.parameters():
            if parameter.grad is None or parameter in kept:
                continue
            # What is in no layer may have a gradient from after the chain.
            if parameter in layers or not parameter.grad.any():
                parameter.grad = None

    def find_shapes(self, mode: str, key: Hashable) -> None:
        """Find what the stages send each other, which a batch then need not; collective.

        Args:
            mode: ``"train"`` or ``"forward"``.
            key: What two batches share if one schedule serves both.
        """
        self._metas.of((mode, key, len(self.current.steps)), self.device)

    def forward(self, key: Hashable, conclude: Conclude) -> None:
        """Forward of the batch in progress, any number of micro-batches.

        Args:
            key: What two batches share if the same buffers serve both.
            conclude: Called on the last stage with what runs the step to its end and the number of
                the micro-batch.
        """
        count = len(self.current.steps)
        self.current.shapes, metas = self._metas.of(("forward", key, count), self.device)
        stages = self._fetch(("forward", key, count), lambda: self._make_stages(metas, count))
        self.current.conclude = conclude
        with self._named_failures():
            self._forward(stages, count)

    def _forward(self, stages: list[LeanStage], count: int) -> None:
        sent: list[Any] = []
        for stage in stages:
            for number in range(count):
                if stage.stage_index - 1 not in self.modules:
                    _wait(_start(stage.get_fwd_recv_ops(number)))
                index = torch.tensor([number])
                output = stage.forward_one_chunk(
                    number, (index,), {"microbatch": index}, save_forward_output=False
                )
                if stage.stage_index + 1 in self.modules:
                    later = next(s for s in stages if s.stage_index == stage.stage_index + 1)
                    later.set_local_fwd_input(output, number)
                elif not stage.is_last:
                    ops = stage.get_fwd_send_ops(number)
                    sent.append((ops, _start(ops)))  # what is on its way must not be freed
                stage.free_forward(number)
        for _, works in sent:
            _wait(works)

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        self.current.doing = None
        try:
            yield
        except Exception as error:
            raise pipeline_error(self.current.place, error) from error

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        if not self.record_timeline:
            yield
            return
        self.timeline = self.current.events = []
        yield
        self.current.events = None

    @contextmanager
    def _waits_counted(self) -> Iterator[None]:
        busy_s, is_timed = self.current.busy_s, self.current.is_timed
        start, before = time.perf_counter(), sum(busy_s.values())
        yield
        if is_timed:
            self.waited_s += time.perf_counter() - start - (sum(busy_s.values()) - before)

    def _fetch(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        self._made.move_to_end(key)
        if len(self._made) > _KEPT_SCHEDULES:
            self._made.popitem(last=False)
        return self._made[key]

    def _make_stages(self, metas: list[list[Meta]], count: int) -> list[LeanStage]:
        """Stages that need not find out shapes, and are ready for ``forward_one_chunk``."""
        stages = [self._stage(index, metas) for index in self.modules]
        for stage in stages:
            stage.prepare_forward(count)
        return stages

    def _stage(self, index: int, metas: list[list[Meta]]) -> LeanStage:
        inputs = [meta.like() for meta in metas[index - 1]] if index else [torch.zeros(1).long()]
        outputs = tuple(meta.like() for meta in metas[index])
        module, backward = self.modules[index], partial(self.current.action, "B")
        metadata: dict[str, Any] = {"input_args": tuple(inputs), "output_args": outputs}
        metadata["group"] = self.group
        return LeanStage(module, index, self.num_stages, self.device, backward, **metadata)

    def _make_schedule(self, metas: list[list[Meta]], count: int) -> tuple[str, Any]:
        stages = [self._stage(index, metas) for index in self.modules]
        name = self.schedule
        if self.schedule_csv is not None:
            return "csv", load_schedule_csv(self.schedule_csv, stages, count, _loss)
        try:
            schedule = self._torch_schedule(name, stages, count)
        except ValueError as reason:  # too few micro-batches, or not a multiple of its rounds
            name = _FALLBACKS[name]
            if str(reason) not in self._warned:
                self._warned.add(str(reason))
                rank_zero_warn(
                    f"PipelineStrategy: a batch of {count} micro-batch(es) runs under {name}, not"
                    f" {self.schedule}: {reason}"
                )
            schedule = self._torch_schedule(name, stages, count)
        return name, schedule

    def _torch_schedule(self, name: str, stages: list[LeanStage], count: int) -> Any:
        these: Any = stages if SCHEDULES.get(name, True) else stages[0]
        # The loss carries the weights of micro-batches; torch would scale accumulated gradients.
        options: dict[str, Any] = {"loss_fn": _loss, "scale_grads": False}
        return get_schedule_class(name)(these, n_microbatches=count, **options)


def _loss(output: Tensor, number: Tensor) -> Tensor:  # noqa: ARG001  # as torch calls it
    """The last stage has run the user's step, and returns its loss."""
    return output


def _start(ops: list[Any]) -> list[Any]:
    return distributed.batch_isend_irecv(ops) if ops else []


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()


def gather_timeline(own: list[Event], is_recorded: bool) -> list[Event]:
    """The actions of all ranks, rank by rank; collective.

    Args:
        own: Those of this rank.
        is_recorded: Whether the strategy records them.

    Raises:
        ValueError: If it does not, or there are none.
    """
    where = "PipelineStrategy.timeline"
    if not is_recorded:
        way_out = "Use PipelineStrategy(record_timeline=True)"
        raise argument_error(where, "record_timeline", False, "nothing was recorded", way_out)
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, own)
    if not all(gathered):
        rule = "no training batch has run through the pipeline"
        raise argument_error(where, "record_timeline", True, rule, "Call it after a step")
    return [event for events in gathered for event in events]
