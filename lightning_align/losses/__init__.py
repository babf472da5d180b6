"""Losses from hidden states and log-probabilities, none of which builds B x T x V logits.

``linear_cross_entropy`` for pretraining and supervised fine-tuning; ``linear_logprobs`` and
``completion_logps`` for everything that needs the log-probability of given tokens; one function for
each preference loss in ``LOSSES``, from the ``PairScores`` and the ``PreferenceOptions``;
``ReferenceLoss`` and ``ReferenceMargin`` for how difficult samples are.
"""

from lightning_align.losses.difficulty import ReferenceLoss, ReferenceMargin
from lightning_align.losses.dpo import (
    Mean,
    dpo_loss_from_batch,
    pairs_that_count,
    preference_step,
)
from lightning_align.losses.linear_cross_entropy import CrossEntropy, linear_cross_entropy
from lightning_align.losses.linear_logprobs import TokenLogprobs, linear_logprobs
from lightning_align.losses.options import PreferenceOptions, check_preference_arguments
from lightning_align.losses.preference import LOSSES, pair_losses, preference_loss
from lightning_align.losses.scores import CompletionScores, PairScores, pair_scores
from lightning_align.losses.sequence_logps import (
    CompletionLogps,
    completion_logps,
    padding_arguments,
    sequence_logps,
)

__all__ = [
    "LOSSES",
    "CompletionLogps",
    "CompletionScores",
    "CrossEntropy",
    "Mean",
    "PairScores",
    "PreferenceOptions",
    "ReferenceLoss",
    "ReferenceMargin",
    "TokenLogprobs",
    "check_preference_arguments",
    "completion_logps",
    "dpo_loss_from_batch",
    "linear_cross_entropy",
    "linear_logprobs",
    "padding_arguments",
    "pair_losses",
    "pair_scores",
    "pairs_that_count",
    "preference_loss",
    "preference_step",
    "sequence_logps",
]
