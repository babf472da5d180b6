"""A step of the user's module on a batch, run through the pipeline and told to all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed

from lightning_align._errors import argument_error
from lightning_align.run.rng import fork_generators
from lightning_align.seeds import derive_seed
from lightning_align.strategies.chain import WHERE, Chain, Step
from lightning_align.strategies.microbatches import (
    checksum,
    join_outputs,
    shape_key,
    split_batch,
)
from lightning_align.strategies.replay import SUMS, LogRecorder, Teller, Told
from lightning_align.strategies.runtime import Runtime

Contexts = Callable[[], AbstractContextManager[Any]]


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
        self._teller = Teller(chain.module, source, group, runtime.device)
        self._has_last = runtime.num_stages - 1 in runtime.modules

    def train(
        self,
        batch: Any,
        rest: tuple[Any, ...],
        count: int,
        *,
        context: Contexts,
        factor: float,
        scale: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Forward and backward of a batch; returns its loss, on all ranks.

        Args:
            batch: The whole batch.
            rest: What Lightning passes ``training_step`` after the batch.
            count: Number of micro-batches.
            context: Makes the precision plugin's context.
            factor: On the loss that is propagated back: one by the batches of the window.
            scale: Loss scaling of the precision plugin.
        """
        module: Any = self.chain.module
        if self._is_plain(count):
            with context():
                loss = _loss(module, module.training_step(batch, *rest))
            torch.autograd.backward(scale(loss * factor))
            return loss.detach()
        microbatches = split_batch(batch, count)
        shares = _shares(module, microbatches)
        # A sum over rows adds up over micro-batches, a mean over rows is averaged.
        weights = [1.0] * count if loss_is_sum(module) else shares
        recorder = LogRecorder(module)
        losses: list[Tensor] = []

        def conclude(run: Callable[[], Any], number: int) -> Tensor:
            with recorder.recording(shares[number]), context():
                loss = _loss(module, run())
            losses.append(loss.detach() * weights[number])
            return scale(loss * (weights[number] * factor))

        with self._working(module.training_step, microbatches, rest, context):
            self.runtime.train(shape_key(microbatches[0]), conclude)
        told = Told(sum(losses, torch.zeros(())), recorder.values()) if self._has_last else None
        return self._tell(told, SUMS[0]).loss  # type: ignore[return-value]

    def evaluate(
        self,
        call: Callable[..., Any],
        batch: Any,
        rest: tuple[Any, ...],
        count: int,
        *,
        context: Contexts,
    ) -> Any:
        """Forward of a batch through a step of the module; returns what it returns, on all ranks.

        Args:
            call: ``validation_step``, ``test_step`` or ``predict_step`` of the module.
            batch: The whole batch.
            rest: What Lightning passes the step after the batch.
            count: Number of micro-batches.
            context: Makes the precision plugin's context.
        """
        if self._is_plain(count):
            with context():
                return call(batch, *rest)
        microbatches = split_batch(batch, count)
        shares = _shares(self.chain.module, microbatches)
        recorder = LogRecorder(self.chain.module)
        outputs: list[Any] = []

        def conclude(run: Callable[[], Any], number: int) -> Tensor:
            with recorder.recording(shares[number]), context():
                outputs.append(run())
            return torch.zeros(())  # torch's stages return tensors

        with self._working(call, microbatches, rest, context):
            self.runtime.forward((call.__name__, shape_key(microbatches[0])), conclude)
        told = None
        if self._has_last:
            told = Told(logs=recorder.values(), outputs=join_outputs(outputs))
        return self._tell(told, SUMS[1]).outputs

    def find_shapes(self, batch: Any, rest: tuple[Any, ...], count: int, context: Contexts) -> None:
        """Run the first micro-batch through the stages, and leave no trace of it.

        Args:
            batch: A whole training batch.
            rest: What Lightning passes ``training_step`` after the batch.
            count: Number of micro-batches.
            context: Makes the precision plugin's context.
        """
        microbatches = split_batch(batch, count)
        with self._working(self.chain.module.training_step, microbatches, rest, context):
            self.runtime.find_shapes(shape_key(microbatches[0]))

    def check_same(self, batch: Any) -> None:
        """Check that every rank of the pipeline has the same batch; collective.

        Raises:
            ValueError: If one has another: its inputs would meet labels of other samples.
        """
        ours = checksum(batch).to(self.runtime.device)
        size = distributed.get_world_size(self.runtime.group)
        theirs = [torch.empty_like(ours) for _ in range(size)]
        distributed.all_gather(theirs, ours, group=self.runtime.group)
        other = [rank for rank, value in enumerate(theirs) if not torch.equal(value, theirs[0])]
        if other:
            rule = f"all ranks must have the same batch, and rank(s) {other} have another than 0"
            way_out = "Call seed_everything, and keep the data loader free of per-rank samplers"
            raise argument_error(WHERE, "batch", "...", rule, way_out)

    def _is_plain(self, count: int) -> bool:
        """Whether this is what Lightning does without a strategy, to the bit."""
        return self.runtime.num_stages == 1 and count == 1

    def _tell(self, told: Told | None, attribute: str) -> Told:
        sums = getattr(self.chain.module, attribute, None)
        if told is not None and isinstance(sums, dict):
            told.sums[attribute] = dict(sums)
        heard = self._teller.tell(told)
        self._teller.replay(heard)
        return heard

    @contextmanager
    def _working(
        self, call: Callable[..., Any], microbatches: list[Any], rest: Any, context: Contexts
    ) -> Iterator[None]:
        """Steps and randomness for a batch; the generators go on as if nothing had been drawn."""
        work = self.runtime.work
        # All ranks are at the same place of their generators, and stay so.
        work.seed = int(torch.randint(2**62, ()))
        work.context = context
        work.steps = [
            Step(call, microbatch, rest, derive_seed(work.seed, number, "step"))
            for number, microbatch in enumerate(microbatches)
        ]
        with fork_generators(self.runtime.device), self.chain.working():
            yield


def loss_is_sum(module: pl.LightningModule) -> bool:
    """Whether the loss of a module's step is a sum over rows, as the module itself declares."""
    return getattr(module, "loss_reduction", "mean") == "sum"


def _shares(module: Any, microbatches: list[Any]) -> list[float]:
    """Which part of the batch each micro-batch is: of its rows, or of what the module weighs."""
    weigh = getattr(module, "pipeline_microbatch_weight", None)
    if weigh is None:
        return [1 / len(microbatches)] * len(microbatches)
    weights = [float(weigh(microbatch)) for microbatch in microbatches]
    total = sum(weights) or 1.0
    return [weight / total for weight in weights]


def _loss(module: pl.LightningModule, output: Any) -> Tensor:
    if isinstance(output, dict) and set(output) == {"loss"}:
        output = output["loss"]
    if isinstance(output, Tensor) and output.numel() == 1:
        return output.reshape(())
    got = f"a dict of {sorted(output)}" if isinstance(output, dict) else type(output).__name__
    rule = f"must return its loss, a tensor with one value, under a pipeline, and returned {got}"
    way_out = "Use self.log for what else it computes"
    raise argument_error(type(module).__name__, "training_step", "...", rule, way_out)
