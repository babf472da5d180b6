"""A mean in its two parts, which can still be merged.

``pairs_that_count`` says over which pairs means are taken.

Shapes: P pairs, B = 2 P sequences, [chosen; rejected].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_align.losses.sequence_logps import CompletionLogps


@dataclass(frozen=True, eq=False)
class Mean:
    """A mean that can still be merged: over batches and ranks, add totals and add counts.

    Attributes:
        total: Sum of the values, in fp32.
        count: Number of values: pairs or tokens.
    """

    total: Tensor
    count: Tensor

    @property
    def value(self) -> Tensor:
        """The mean; 0 of nothing."""
        return self.total / self.count.clamp(min=1)


def pairs_that_count(policy: CompletionLogps) -> Tensor:
    """Which pairs are in losses and metrics: (P,), True where either side has a completion token.

    A pair without any is what a sampler fills up the last batch of a rank with. One with an empty
    side is a preference all the same, and TRL counts it: its log-ratio on that side is 0.

    Args:
        policy: Scored completions, rows [chosen; rejected].
    """
    chosen_lengths_P, rejected_lengths_P = policy.lengths_B.chunk(2)
    return (chosen_lengths_P > 0) | (rejected_lengths_P > 0)
