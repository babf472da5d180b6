"""When a step's micro-batches are compared with its batch in one piece, and what is said of it.

``comparison.py`` says whether they come to the same, and by which rules.
"""

from __future__ import annotations

from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_warn

from lightning_align.planner.trace import not_traced
from lightning_align.strategies.pipeline import comparison
from lightning_align.strategies.pipeline.batch_step import BatchStep
from lightning_align.strategies.pipeline.joining import Joiner
from lightning_align.strategies.pipeline.replay import ResultBroadcaster, StepResult
from lightning_align.strategies.pipeline.running import MicrobatchRunner
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
            self._joiners[step.kind] = Joiner(comparison.tolerance_of(self._module))
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
                    f" batch in one piece, so nothing says that they come to the same: {failed}"
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
                f"PipelineStrategy: {step.name} logs, returns or changes {list(result.undecided)},"
                f" of which {joiner.comparisons} comparison(s) with a batch in one piece do not"
                " tell what it is of its micro-batches: the likeliest is taken"
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
        in_one_piece, failures = replace(sample, count=1), list[str]()
        with comparison.leaving_no_trace(self._module), not_traced():
            try:
                whole = self._runner.forward(in_one_piece, failures)
                pieces = self._runner.forward(sample, failures)
                repeated = self._runner.forward(in_one_piece, failures)  # with other random numbers
            except StageError as error:  # on all ranks
                return str(error)
        # Only the last stage has run the step to its end, and all must come to the same verdict.
        own: comparison.Verdict | None = None
        if failures:
            own = comparison.Verdict(failed=failures[0])
        elif self._runner.runtime.has_last:
            runs = whole.parts[0], pieces.parts, repeated.parts[0]
            own = comparison.judge(self._module, joiner, *runs, trains=step.trains)
        verdict: comparison.Verdict = self._broadcaster.broadcast_object(own)
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
