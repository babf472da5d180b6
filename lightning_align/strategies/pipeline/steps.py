"""A step of the user's module on a batch, run through the pipeline, with its result on all ranks.

A training batch under 1F1B: two ranks, a stage each, four micro-batches. ``F1`` is the forward of
micro-batch 1, ``B1`` its backward. The numbers stand in the code of the files named.

    [1]   the whole batch on every rank, the first ones compared              strategy, checks
    [2]   batches 1, 2, 4, 8, ...: micro-batches against one piece            step_comparisons
    [3]   cut; one seed for all ranks; the module's attributes noted          running
    [4]   what stages hand on: found once for batches of a shape              stages
    [5]   torch's schedule                                                    runtime

               clock        0   1   2   3   4   5   6   7   8   9
               rank 0      F0  F1   .  B0  F2  B1  F3  B2   .  B3
               rank 1       .  F0  B0  F1  B1  F2  B2  F3  B3   .

          rank 0, stage 0: F1              rank 1, stage 1, the last: F1
    [6]   the number 1                     the number 1, what stage 0 sent    stages
    [7]   attributes and seed as at [3],   the same                           running, chain
          the user's step from its start
    [8]                                    layers of stage 0: stand-ins,      passage
                                           the last of them: what was sent
    [9]   layers of stage 0, computed      layers of stage 1, computed        passage
    [10]  the step is left at the next     -                                  passage, chain
          layer; its input is sent on
    [11]  -                                the step runs to its end: what     running, replay
                                           it logs and changes is noted
    [12]  -                                loss, weighted by its share        steps
    [13]  B1: gradient from stage 1        B1: loss to what was sent at [8]   passage

    [14]  no gradients where no backward came                                 runtime
    [15]  what micro-batches came to, joined on the last stage, sent to all   steps, replay
    [16]  window closed: gradients of tied weights added up                   strategy, ownership
    [17]  gradients kept through Lightning's zero_grad and backward           early_gradients
    [18]  settings compared; the optimizer steps                              strategy, checks

Evaluation is [1] to [11] and [15], without a schedule: stage by stage, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from lightning_align.run.protocols import loss_is_sum
from lightning_align.strategies.pipeline.batch_step import BatchStep
from lightning_align.strategies.pipeline.chain import Chain
from lightning_align.strategies.pipeline.replay import ResultBroadcaster, StepRecorder, StepResult
from lightning_align.strategies.pipeline.running import MicrobatchRunner, loss_of
from lightning_align.strategies.pipeline.runtime import Runtime
from lightning_align.strategies.pipeline.step_comparisons import StepComparisons


class PipelineSteps:
    """Training and evaluation of one module by the ranks of one pipeline.

    Args:
        chain: The user's module as a chain.
        runtime: The stages of this rank.
    """

    def __init__(self, chain: Chain, runtime: Runtime) -> None:
        self.chain, self.runtime = chain, runtime
        group, size = runtime.group, distributed.get_world_size(runtime.group)
        source = distributed.get_global_rank(group, (runtime.num_stages - 1) % size)
        self._runner = MicrobatchRunner(chain, runtime)
        self._broadcaster = ResultBroadcaster(
            chain.module, self._runner.attributes, source, group, runtime.device
        )
        self._comparisons = StepComparisons(self._runner, self._broadcaster)

    def train(self, step: BatchStep, *, factor: float, scale: Callable[[Tensor], Tensor]) -> Tensor:
        """Forward and backward of a batch; returns its loss, on all ranks.

        Args:
            step: The training step.
            factor: On the loss that is propagated back: one by the batches of the window.
            scale: Loss scaling of the precision plugin.
        """
        module = self.chain.module
        if self._is_plain(step):
            with step.context():
                loss = loss_of(module, step.call(step.batch, *step.rest))
            torch.autograd.backward(scale(loss * factor))
            return loss.detach()
        is_sum = loss_is_sum(module)
        losses: list[Tensor] = []

        def weighed(loss: Tensor, share: float) -> Tensor:
            # [12] A sum over rows adds up over micro-batches, a mean over rows is averaged.
            weight = 1.0 if is_sum else share
            losses.append(loss.detach() * weight)
            return scale(loss * (weight * factor))

        self._comparisons.before(step)  # [2]
        recorder = self._runner.train(step, weighed)  # [3] to [14]
        result = self._everywhere(step, recorder, sum(losses, torch.zeros(())))
        return result.loss  # type: ignore[return-value]

    def evaluate(self, step: BatchStep) -> Any:
        """Forward of a batch through a step; returns what it returns, on all ranks."""
        if self._is_plain(step):
            with step.context():
                return step.call(step.batch, *step.rest)
        self._comparisons.before(step)
        return self._everywhere(step, self._runner.forward(step)).outputs

    def rehearse(self, step: BatchStep) -> None:
        """Run micro-batches through the stages, compare them, and leave no trace; collective.

        Raises:
            ValueError: If the step does not call its chain as one, or fails, or its micro-batches
                do not come to what their rows come to in one piece, on all ranks.
        """
        self._runner.find_shapes(step)
        self._comparisons.compare(step)

    def _is_plain(self, step: BatchStep) -> bool:
        """Whether this is what Lightning does without a strategy, to the bit."""
        return self.runtime.num_stages == 1 and step.count == 1

    def _everywhere(
        self, step: BatchStep, recorder: StepRecorder, loss: Tensor | None = None
    ) -> StepResult:
        """What the batch came to on the last stage, done again on all ranks; collective."""

        def joined() -> StepResult:  # [15]
            own = None
            if self.runtime.has_last:
                own = recorder.result(self._comparisons.joiner(step), loss)
            return self._broadcaster.broadcast(step.kind, own)

        result = joined()
        if self._comparisons.learns_more(step, result):
            result = joined()  # by the rules that it has now
        self._comparisons.warn_once(step, result)
        self._broadcaster.replay(result)
        return result
