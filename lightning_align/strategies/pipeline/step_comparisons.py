"""When a step's micro-batches are compared with its batch in one piece, and what is said of it.

``comparison.py`` says whether they come to the same, and by which rules.
"""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn

from lightning_align.strategies.pipeline.batch_step import BatchStep
from lightning_align.strategies.pipeline.comparison import (
    Verdict,
    judge,
    leaving_no_trace,
    tolerance_of,
)
from lightning_align.strategies.pipeline.joining import Joiner
from lightning_align.strategies.pipeline.replay import Part, ResultBroadcaster, StepResult
from lightning_align.strategies.pipeline.running import MicrobatchRunner
from lightning_align.strategies.pipeline.shares import loss_is_sum
from lightning_align.strategies.pipeline.stages import StageError

_COMPARISONS = 4  # of one step: values that are zero, or all alike, do not tell their rule


class StepComparisons:
    """Compares the steps of a module, and keeps what it has learned of each.

    Args:
        runner: Runs micro-batches.
        broadcaster: Sends what the last stage found to all ranks.
    """

    def __init__(self, runner: MicrobatchRunner, broadcaster: ResultBroadcaster) -> None:
        self._runner, self._broadcaster = runner, broadcaster
        self._module = runner.chain.module
        self._joiners: dict[str, Joiner] = {}

    def joiner(self, step: BatchStep) -> Joiner:
        """What is known of steps of this kind."""
        if step.kind not in self._joiners:
            self._joiners[step.kind] = Joiner(tolerance_of(self._module))
        return self._joiners[step.kind]

    def before(self, step: BatchStep) -> None:
        """Compare at the first batch, unless it was done at set-up, and at later ones again."""
        # [2] Before anything is trained on the batch.
        joiner = self.joiner(step)
        joiner.batches += 1
        if step.count == 1:
            return
        if joiner.is_compared:
            # A step may turn to another loss: after twice as many batches each time.
            if joiner.batches > 1 and joiner.batches & (joiner.batches - 1) == 0:
                self.compare(step, again=True)
        elif joiner.comparisons < _COMPARISONS:
            failed = self.compare(step)
            if failed is not None:
                joiner.comparisons = _COMPARISONS
                rank_zero_warn(
                    f"PipelineStrategy: micro-batches of {step.name} could not be compared with a"
                    " batch in one piece, so nothing says that they come to the same:"
                    f" {failed}"
                )

    def learns_more(self, step: BatchStep, result: StepResult) -> bool:
        """Compare once more where a result could not be told for certain; collective."""
        if not result.undecided or self.joiner(step).comparisons >= _COMPARISONS:
            return False
        self.compare(step)
        return True

    def warn_once(self, step: BatchStep, result: StepResult) -> None:
        """Say what of a result was guessed."""
        joiner = self.joiner(step)
        if joiner.has_warned:
            return
        if result.unseen and joiner.is_compared:
            joiner.has_warned = True
            rank_zero_warn(
                f"PipelineStrategy: {step.name} logs or changes {list(result.unseen)}, which it"
                " did not when micro-batches were compared with a batch in one piece: numbers are"
                " added up, and others averaged or put one below the other"
            )
        elif result.undecided:
            joiner.has_warned = True
            rank_zero_warn(
                f"PipelineStrategy: {step.name} logs, returns or changes"
                f" {list(result.undecided)}, of which {joiner.comparisons} comparison(s) with a"
                " batch in one piece do not tell what it is of its micro-batches: the likeliest is"
                " taken"
            )

    def compare(self, step: BatchStep, *, again: bool = False) -> str | None:
        """Compare micro-batches with some rows of a batch in one piece; collective.

        Args:
            step: The step.
            again: Whether it is only to see that what was found still holds: where weights have
                changed since, what does not is warned of once.

        Returns:
            Why it could not be done, or None.

        Raises:
            ValueError: If they do not come to the same, on all ranks.
        """
        joiner, sample = self.joiner(step), step.sample()
        if sample.count == 1:
            return None
        joiner.comparisons += not again
        with leaving_no_trace(self._module):
            try:
                whole = self._observed(sample.in_one_piece())
                parts = self._observed(sample)
                repeated = self._observed(sample.in_one_piece())  # with other random numbers
            except StageError as error:  # on all ranks
                return str(error)
        # Only the last stage has run the step to its end, and all must come to the same verdict.
        is_last = self._runner.runtime.has_last
        own = self._judge(step, joiner, whole, parts, repeated) if is_last else None
        verdict: Verdict = self._broadcaster.broadcast_object(own)
        for warning in verdict.warnings:
            rank_zero_warn(warning)
        if verdict.error is not None:
            # Before the first step of the optimizer nothing is lost by a refusal.
            if not again or self._module.trainer.global_step == 0:
                raise ValueError(verdict.error)
            if not joiner.has_changed:
                joiner.has_changed = True
                rank_zero_warn(f"{verdict.error} It did come to the same in the first batch.")
        if again:
            return None
        joiner.is_compared = verdict.failed is None
        return verdict.failed

    def _observed(self, step: BatchStep) -> list[Part] | str:
        """What the step does on each micro-batch, or on the last stage what it raises."""
        failures: list[str] = []
        recorder = self._runner.forward(step, failures)
        return failures[0] if failures else recorder.parts

    def _judge(
        self,
        step: BatchStep,
        joiner: Joiner,
        whole: list[Part] | str,
        parts: list[Part] | str,
        repeated: list[Part] | str,
    ) -> Verdict:
        for run in (whole, parts, repeated):
            if isinstance(run, str):
                return Verdict(failed=run)
        is_sum = loss_is_sum(self._module)
        return judge(
            self._module,
            joiner,
            whole[0],  # type: ignore[arg-type]
            parts,  # type: ignore[arg-type]
            repeated[0],  # type: ignore[arg-type]
            trains=step.trains,
            loss_is_sum=is_sum,
        )
