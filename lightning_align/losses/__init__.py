"""Losses from hidden states and log-probabilities, none of which builds B x T x V logits.

``linear_cross_entropy`` for pretraining and supervised fine-tuning; ``linear_logprobs`` and
``completion_logps`` for everything that needs the log-probability of given tokens; one function for
each preference loss in ``LOSSES``, from the ``PairScores`` and the ``PreferenceOptions``, and for
those of single completions in ``UNPAIRED_LOSSES``;
``ReferenceLoss`` and ``ReferenceMargin`` for how difficult samples are.
"""

from lightning_align.losses.combined import pair_losses, preference_loss
from lightning_align.losses.difficulty import ReferenceLoss, ReferenceMargin
from lightning_align.losses.dpo import (
    check_sharing,
    dpo_loss_from_batch,
    objective_step,
    preference_step,
)
from lightning_align.losses.first_loss import FirstLoss, first_losses, theoretical_first_losses
from lightning_align.losses.linear_cross_entropy import CrossEntropy, linear_cross_entropy
from lightning_align.losses.linear_logprobs import TokenLogprobs, linear_logprobs
from lightning_align.losses.means import Mean, pairs_that_count
from lightning_align.losses.options import PreferenceOptions, check_preference_arguments
from lightning_align.losses.pair_attention import PairAttention, check_pair_attention
from lightning_align.losses.pair_layout import PairLayout, lay_out_pairs
from lightning_align.losses.pair_statistics import (
    MARGIN_BINS,
    length_correlation,
    margin_counts,
    margin_edges,
    pair_statistics,
)
from lightning_align.losses.preference import LOSSES, implicit_rewards
from lightning_align.losses.router import (
    experts_per_token,
    load_balancing_loss,
    no_router_error,
    router_coefficient,
)
from lightning_align.losses.sampled_kl import KLEstimate, kl_from_sums, kl_sums
from lightning_align.losses.scores import CompletionScores, PairScores, pair_scores
from lightning_align.losses.sequence_logps import (
    CompletionLogps,
    completion_logps,
    padding_arguments,
    pair_layout,
    sequence_logps,
)
from lightning_align.losses.unpaired import (
    UNPAIRED_LOSSES,
    UnpairedScores,
    kl_estimate,
    kl_of_scored,
    unpaired_loss,
    unpaired_step,
    with_margins,
)

__all__ = [
    "LOSSES",
    "MARGIN_BINS",
    "UNPAIRED_LOSSES",
    "CompletionLogps",
    "CompletionScores",
    "CrossEntropy",
    "FirstLoss",
    "KLEstimate",
    "Mean",
    "PairAttention",
    "PairLayout",
    "PairScores",
    "PreferenceOptions",
    "ReferenceLoss",
    "ReferenceMargin",
    "TokenLogprobs",
    "UnpairedScores",
    "check_pair_attention",
    "check_preference_arguments",
    "check_sharing",
    "completion_logps",
    "dpo_loss_from_batch",
    "experts_per_token",
    "first_losses",
    "implicit_rewards",
    "kl_estimate",
    "kl_from_sums",
    "kl_of_scored",
    "kl_sums",
    "lay_out_pairs",
    "length_correlation",
    "linear_cross_entropy",
    "linear_logprobs",
    "load_balancing_loss",
    "margin_counts",
    "margin_edges",
    "no_router_error",
    "objective_step",
    "padding_arguments",
    "pair_layout",
    "pair_losses",
    "pair_scores",
    "pair_statistics",
    "pairs_that_count",
    "preference_loss",
    "preference_step",
    "router_coefficient",
    "sequence_logps",
    "theoretical_first_losses",
    "unpaired_loss",
    "unpaired_step",
    "with_margins",
]
