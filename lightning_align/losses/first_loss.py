"""What the loss must be before the first step, when policy and reference are one model.

All log-ratios are then 0, so that a loss that sees nothing else has a value that no data change:
log 2, 1, 1 / (4 beta^2) and so on. A first loss that is another one says that the two models were
not computed alike.

Shapes: P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_align.losses.combined import loss_terms
from lightning_align.losses.means import pairs_that_count
from lightning_align.losses.options import PreferenceOptions
from lightning_align.losses.scores import CompletionScores, PairScores, pair_scores
from lightning_align.losses.sequence_logps import CompletionLogps


@dataclass(frozen=True)
class FirstLoss:
    """A loss before the first step beside the one that theory asks for; means over pairs.

    Attributes:
        name: Of the loss.
        loss: As measured.
        theory: With all log-ratios 0.
        deviation: Mean distance of the two, pair by pair: errors of either sign do not cancel.
    """

    name: str
    loss: float
    theory: float
    deviation: float


def theoretical_first_losses(
    options: PreferenceOptions, chosen_lengths_P: Tensor, rejected_lengths_P: Tensor
) -> dict[str, Tensor]:
    """Loss of each pair, (P,), by name, where policy and reference agree.

    Losses of log-probabilities instead of log-ratios (cpo, simpo, alphapo, orpo, sft, and all with
    ``reference_free``) depend on the model even then, and are left out. Without R-DPO's
    ``length_alpha`` nothing depends on the lengths.

    Args:
        options: Which losses of pairs, and their constants.
        chosen_lengths_P: Tokens of the chosen completions.
        rejected_lengths_P: Of the rejected ones.

    Example:
        >>> one = torch.ones(1)
        >>> theoretical_first_losses(PreferenceOptions("ipo", beta=0.1), one, one)
        {'ipo': tensor([25.])}
    """
    zeros_P = torch.zeros_like(chosen_lengths_P, dtype=torch.float32)
    chosen = CompletionScores(zeros_P, zeros_P, chosen_lengths_P)
    rejected = CompletionScores(zeros_P, zeros_P, rejected_lengths_P)
    terms = loss_terms(PairScores(chosen, rejected), replace(options, use_weighting=False))
    return {name: terms[name] for name in _with_theory(options)}


@torch.no_grad()
def first_losses(
    policy: CompletionLogps, reference: CompletionLogps, options: PreferenceOptions
) -> list[FirstLoss]:
    """Each loss that has a theoretical value, on a batch of pairs, before WPO's weights.

    Args:
        policy: Scored by the model in training, rows [chosen; rejected].
        reference: The same rows scored by the reference.
        options: Which losses of pairs, and their constants.
    """
    scores = pair_scores(policy, reference, "first_losses", ld_alpha=options.ld_alpha)
    counted_P = pairs_that_count(policy)
    measured = loss_terms(scores, replace(options, use_weighting=False), counted_P)
    theory = theoretical_first_losses(options, *policy.lengths_B.chunk(2))
    found = []
    for name, theory_P in theory.items():
        ours_P, theory_P = measured[name][counted_P].double(), theory_P[counted_P].double()
        if len(ours_P):
            values = ours_P.mean(), theory_P.mean(), (ours_P - theory_P).abs().mean()
            found.append(FirstLoss(name, *(value.item() for value in values)))
    return found


def _with_theory(options: PreferenceOptions) -> list[str]:
    return options.losses_that_read("reference_free") if options.needs_reference else []
