"""Runs the micro-batches of a batch through the stages, each as if it were the first.

On all ranks generators and attributes of the module are the same before a batch, before each of its
micro-batches, and after it: what one process would have comes from ``replay.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_align._errors import argument_error
from lightning_align.seeds import derive_seed, fork_generators
from lightning_align.strategies.pipeline.batch_step import BatchStep
from lightning_align.strategies.pipeline.chain import Chain, Step
from lightning_align.strategies.pipeline.microbatches import shape_key
from lightning_align.strategies.pipeline.replay import StepRecorder
from lightning_align.strategies.pipeline.runtime import Runtime
from lightning_align.strategies.pipeline.shares import shares_of
from lightning_align.strategies.pipeline.step_attributes import StepAttributes, frozen


class MicrobatchRunner:
    """Runs a batch through the stages, and records what the step does on the last one.

    Args:
        chain: The user's module as a chain.
        runtime: The stages of this rank.
    """

    def __init__(self, chain: Chain, runtime: Runtime) -> None:
        self.chain, self.runtime = chain, runtime
        self.attributes = StepAttributes(chain.module, chain.owned(0, len(chain.layers)))

    def train(self, step: BatchStep, weighed: Callable[[Tensor, float], Tensor]) -> StepRecorder:
        """Forward and backward.

        Args:
            step: A training step.
            weighed: Gets loss and share of a micro-batch; returns what is propagated back.
        """
        with self._prepared(step) as (key, recorder):

            def conclude(run: Callable[[], Any], number: int) -> Tensor:  # [11]
                with recorder.recording(number) as part, step.context():
                    loss = loss_of(self.chain.module, run())
                return weighed(loss, part.share)

            self.runtime.train(key, conclude)
        return recorder

    def forward(self, step: BatchStep, failures: list[str] | None = None) -> StepRecorder:
        """Forward alone, of any step; what it returns is recorded, too.

        Args:
            step: A step.
            failures: Gets what the step raises on the last stage, in words, in place of an end:
                other stages do not hear of it and go on sending.
        """
        with self._prepared(step) as (key, recorder):

            def conclude(run: Callable[[], Any], number: int) -> Tensor:
                try:
                    with recorder.recording(number) as part, step.context():
                        output = run()
                        if step.trains:
                            output = loss_of(self.chain.module, output)
                        part.output = frozen(output, None)
                except Exception as error:
                    if failures is None:
                        raise
                    failures.append(f"{type(error).__name__}: {error}")
                return torch.zeros(())  # torch's stages return tensors

            self.runtime.forward((step.name, key), conclude)
        return recorder

    def find_shapes(self, step: BatchStep) -> None:
        """Find what stages hand on in a step, and whether step and chain fit together; collective.

        Raises:
            ValueError: If they do not, or the step fails, on all ranks.
        """
        with self._prepared(step) as (key, _):
            mode, key = ("train", key) if step.trains else ("forward", (step.name, key))
            self.runtime.find_shapes(mode, key)

    @contextmanager
    def _prepared(self, step: BatchStep) -> Iterator[tuple[Hashable, StepRecorder]]:
        """What the stages need for a batch; generators and attributes are the same behind it."""
        # [3] All ranks are at the same place of their generators, and stay so: one number is drawn
        # here, and what follows from it is forgotten at the end.
        module, microbatches = self.chain.module, step.microbatches()
        current = self.runtime.current
        current.seed = int(torch.randint(2**62, ()))
        current.context = step.context
        begun = self.attributes.take()

        def begin(*args: Any) -> Any:
            # [7] What ran before on this rank was another micro-batch, perhaps left half way.
            self.attributes.restore(begun)
            return step.call(*args)

        current.steps = [
            Step(begin, microbatch, step.rest, derive_seed(current.seed, number, "step"))
            for number, microbatch in enumerate(microbatches)
        ]
        try:
            with fork_generators(self.runtime.device), self.chain.working():
                shares = shares_of(module, current.steps)
                recorder = StepRecorder(module, self.attributes, begun, shares)
                yield shape_key(microbatches[0]), recorder
        finally:
            self.attributes.restore(begun)


def loss_of(module: pl.LightningModule, output: Any) -> Tensor:
    """The loss that a training step has returned.

    Raises:
        ValueError: If it has returned anything else.
    """
    if isinstance(output, dict) and set(output) == {"loss"}:
        output = output["loss"]
    if isinstance(output, Tensor) and output.numel() == 1:
        return output.reshape(())
    got = f"a dict of {sorted(output)}" if isinstance(output, dict) else type(output).__name__
    rule = f"must return its loss, a tensor with one value, under a pipeline, and returned {got}"
    way_out = "Use self.log for what else it computes"
    raise argument_error(type(module).__name__, "training_step", "...", rule, way_out)
