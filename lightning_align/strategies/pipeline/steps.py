"""A step of the user's module on a batch, run through the pipeline and told to all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed

from lightning_align._errors import argument_error
from lightning_align.run.protocols import loss_is_sum
from lightning_align.seeds import derive_seed, fork_generators
from lightning_align.strategies.pipeline.chain import WHERE, Chain, Step
from lightning_align.strategies.pipeline.comparison import (
    Verdict,
    compared_rows,
    first_rows,
    judge,
    leaving_no_trace,
    tolerance_of,
)
from lightning_align.strategies.pipeline.joining import Joiner
from lightning_align.strategies.pipeline.microbatches import checksum, shape_key, split_batch
from lightning_align.strategies.pipeline.replay import (
    Part,
    ResultBroadcaster,
    StepRecorder,
    StepResult,
)
from lightning_align.strategies.pipeline.runtime import Runtime
from lightning_align.strategies.pipeline.shares import shares_of
from lightning_align.strategies.pipeline.stages import StageError
from lightning_align.strategies.pipeline.step_attributes import StepAttributes, frozen

_COMPARISONS = 4  # of one step: values that are zero, or all alike, do not tell their rule

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
        self.attributes = StepAttributes(chain.module, chain.owned(0, len(chain.layers)))
        self.broadcaster = ResultBroadcaster(
            chain.module, self.attributes, source, group, runtime.device
        )
        self._joiners: dict[str, Joiner] = {}
        self.has_last = runtime.num_stages - 1 in runtime.modules

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
        shares: list[float] = []
        is_sum = loss_is_sum(module)
        call = module.training_step
        self._compare_first(call, batch, rest, count, context)
        recorder = StepRecorder(module, self.attributes)
        losses: list[Tensor] = []

        def conclude(run: Callable[[], Any], number: int) -> Tensor:
            with recorder.recording(shares[number]), context():
                loss = _loss(module, run())
            # A sum over rows adds up over micro-batches, a mean over rows is averaged.
            weight = 1.0 if is_sum else shares[number]
            losses.append(loss.detach() * weight)
            return scale(loss * (weight * factor))

        with self._working(call, microbatches, rest, context):
            shares += shares_of(module, self.runtime.work.steps)
            self.runtime.train(shape_key(microbatches[0]), conclude)
        loss = sum(losses, torch.zeros(()))
        told = self._tell(call, batch, rest, count, context, recorder, loss)
        return told.loss  # type: ignore[return-value]

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
        shares: list[float] = []
        self._compare_first(call, batch, rest, count, context)
        recorder = StepRecorder(self.chain.module, self.attributes)

        def conclude(run: Callable[[], Any], number: int) -> Tensor:
            with recorder.recording(shares[number]) as part, context():
                part.output = frozen(run(), None)
            return torch.zeros(())  # torch's stages return tensors

        with self._working(call, microbatches, rest, context):
            shares += shares_of(self.chain.module, self.runtime.work.steps)
            self.runtime.forward((call.__name__, shape_key(microbatches[0])), conclude)
        return self._tell(call, batch, rest, count, context, recorder).outputs

    def rehearse(
        self,
        call: Callable[..., Any],
        batch: Any,
        rest: tuple[Any, ...],
        count: int,
        context: Contexts,
    ) -> None:
        """Run micro-batches through the stages, compare them, and leave no trace; collective.

        Arguments are those of ``evaluate``.

        Raises:
            ValueError: If the step does not call its chain as one, or fails, or its micro-batches
                do not come to what their rows come to in one piece, on all ranks.
        """
        microbatches = split_batch(batch, count)
        key = shape_key(microbatches[0])
        with self._working(call, microbatches, rest, context):
            if call == self.chain.module.training_step:
                self.runtime.find_shapes("train", key)
            else:
                self.runtime.find_shapes("forward", (call.__name__, key))
        self.compare(call, batch, rest, count, context)

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

    # Comparing and telling.

    def compare(
        self,
        call: Callable[..., Any],
        batch: Any,
        rest: tuple[Any, ...],
        count: int,
        context: Contexts,
        *,
        again: bool = False,
    ) -> str | None:
        """Compare micro-batches with some rows of a batch in one piece; collective.

        Arguments are those of ``evaluate``. ``again`` is only to see that what was found still
        holds: where weights have changed since, what does not is warned of once.

        Returns:
            Why it could not be done, or None.

        Raises:
            ValueError: If they do not come to the same, on all ranks.
        """
        rows, parts = compared_rows(batch, count)
        joiner = self._joiner(call, rest)
        if parts == 1:
            return None
        joiner.comparisons += not again
        batch = first_rows(batch, rows)
        with leaving_no_trace(self.chain.module):
            try:
                whole = self._observe(call, [batch], rest, context)
                pieces = self._observe(call, split_batch(batch, parts), rest, context)
                other = self._observe(call, [batch], rest, context)
            except StageError as error:  # on all ranks
                return str(error)
        judged = None
        if self.has_last:
            judged = self._judge(call, joiner, whole, pieces, other)
        verdict: Verdict = self.broadcaster.object(judged)
        for warning in verdict.warnings:
            rank_zero_warn(warning)
        if verdict.error is not None:
            if not again or self.chain.module.trainer.global_step == 0:
                raise ValueError(verdict.error)
            if not joiner.has_changed:
                joiner.has_changed = True
                rank_zero_warn(f"{verdict.error} It did come to the same in the first batch.")
        if again:
            return None
        joiner.is_compared = verdict.failed is None
        return verdict.failed

    def _judge(
        self, call: Callable[..., Any], joiner: Joiner, whole: Any, pieces: Any, other: Any
    ) -> Verdict:
        failed = next((run for run in (whole, pieces, other) if isinstance(run, str)), None)
        if failed is not None:
            return Verdict(failed=failed)
        module: Any = self.chain.module
        trains = call == module.training_step
        return judge(
            module,
            joiner,
            whole[0],
            pieces,
            other[0],
            trains=trains,
            loss_is_sum=loss_is_sum(module),
        )

    def _observe(
        self, call: Callable[..., Any], microbatches: list[Any], rest: Any, context: Contexts
    ) -> list[Part] | str:
        """What a step does, forward alone; collective. On the last stage what it raises, if so."""
        module: Any = self.chain.module
        shares: list[float] = []
        recorder = StepRecorder(module, self.attributes)
        failed: list[str] = []

        def conclude(run: Callable[[], Any], number: int) -> Tensor:
            try:
                with recorder.recording(shares[number]) as part, context():
                    result = None if failed else run()
                    is_loss = call == module.training_step and not failed
                    part.output = frozen(_loss(module, result) if is_loss else result, None)
            except Exception as error:
                failed.append(f"{type(error).__name__}: {error}")
            return torch.zeros(())  # torch's stages return tensors

        with self._working(call, microbatches, rest, context):
            shares += shares_of(module, self.runtime.work.steps)
            self.runtime.forward((call.__name__, shape_key(microbatches[0])), conclude)
        return failed[0] if failed else recorder.parts

    def _joiner(self, call: Callable[..., Any], rest: tuple[Any, ...]) -> Joiner:
        key = _kind(call, rest)
        if key not in self._joiners:
            self._joiners[key] = Joiner(tolerance_of(self.chain.module))
        return self._joiners[key]

    def _compare_first(
        self,
        call: Callable[..., Any],
        batch: Any,
        rest: tuple[Any, ...],
        count: int,
        context: Contexts,
    ) -> None:
        """Compare at the first batch, unless it was done at set-up, and at later ones again."""
        joiner = self._joiner(call, rest)
        joiner.batches += 1
        if count == 1:
            return
        if joiner.is_compared:
            # A step may turn to another loss: after twice as many batches each time.
            if joiner.batches > 1 and joiner.batches & (joiner.batches - 1) == 0:
                self.compare(call, batch, rest, count, context, again=True)
            return
        if joiner.comparisons >= _COMPARISONS:
            return
        failed = self.compare(call, batch, rest, count, context)
        if failed is not None:
            joiner.comparisons = _COMPARISONS
            rank_zero_warn(
                f"PipelineStrategy: micro-batches of {call.__name__} could not be compared with a"
                f" batch in one piece, so nothing says that they come to the same: {failed}"
            )

    def _tell(
        self,
        call: Callable[..., Any],
        batch: Any,
        rest: tuple[Any, ...],
        count: int,
        context: Contexts,
        recorder: StepRecorder,
        loss: Tensor | None = None,
    ) -> StepResult:
        kind, joiner = _kind(call, rest), self._joiner(call, rest)

        def tell() -> StepResult:
            told = recorder.told(joiner) if self.has_last else None
            if told is not None:
                told.loss = loss
                told.outputs = None if loss is not None else told.outputs
            return self.broadcaster.tell(kind, told)

        told = tell()
        if told.undecided and joiner.comparisons < _COMPARISONS:
            self.compare(call, batch, rest, count, context)
            told = tell()
        if told.unseen and joiner.is_compared and not joiner.has_warned:
            joiner.has_warned = True
            rank_zero_warn(
                f"PipelineStrategy: {call.__name__} logs or changes {list(told.unseen)}, which it"
                " did not when micro-batches were compared with a batch in one piece: numbers are"
                " added up, and others averaged or put one below the other"
            )
        elif told.undecided and not joiner.has_warned:
            joiner.has_warned = True
            rank_zero_warn(
                f"PipelineStrategy: {call.__name__} logs, returns or changes"
                f" {list(told.undecided)}, of which {joiner.comparisons} comparison(s) with a batch"
                " in one piece do not tell what it is of its micro-batches: the likeliest is taken"
            )
        self.broadcaster.replay(told)
        return told

    @contextmanager
    def _working(
        self, call: Callable[..., Any], microbatches: list[Any], rest: Any, context: Contexts
    ) -> Iterator[None]:
        """Steps and randomness for a batch; the generators go on as if nothing had been drawn."""
        work = self.runtime.work
        # All ranks are at the same place of their generators, and stay so.
        work.seed = int(torch.randint(2**62, ()))
        work.context = context
        begun = self.attributes.take()

        def begin(*args: Any) -> Any:
            self.attributes.restore(begun)  # whatever ran before on this rank
            return call(*args)

        work.steps = [
            Step(begin, microbatch, rest, derive_seed(work.seed, number, "step"))
            for number, microbatch in enumerate(microbatches)
        ]
        try:
            with fork_generators(self.runtime.device), self.chain.working():
                yield
        finally:
            self.attributes.restore(begun)


def _kind(call: Callable[..., Any], rest: tuple[Any, ...]) -> str:
    """A step, and the data loader of several that its batch is from."""
    return f"{call.__name__}{rest[1:]}"


def _loss(module: pl.LightningModule, output: Any) -> Tensor:
    if isinstance(output, dict) and set(output) == {"loss"}:
        output = output["loss"]
    if isinstance(output, Tensor) and output.numel() == 1:
        return output.reshape(())
    got = f"a dict of {sorted(output)}" if isinstance(output, dict) else type(output).__name__
    rule = f"must return its loss, a tensor with one value, under a pipeline, and returned {got}"
    way_out = "Use self.log for what else it computes"
    raise argument_error(type(module).__name__, "training_step", "...", rule, way_out)
