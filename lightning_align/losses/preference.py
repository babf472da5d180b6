"""Preference losses: one function for each, from the scores of pairs and the options to the losses.

Every loss here sees a pair only through its ``margin``, the difference of the log-ratios of its two
completions to the reference; beta times a log-ratio is DPO's implicit reward.

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_align._errors import argument_error
from lightning_align.losses.options import PreferenceOptions, losses_that_read
from lightning_align.losses.scores import CompletionScores, PairScores


def sigmoid(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """DPO (Rafailov et al., arXiv:2305.18290): the pair's Bradley-Terry log-likelihood."""
    return -F.logsigmoid(options.beta * scores.margin)  # Eq. 7


def hinge(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """SLiC's margin loss (Zhao et al., arXiv:2305.10425) on DPO's rewards: zero from a margin of 1.

    Normalised by a reference it is the hinge-norm of RSO (Liu et al., arXiv:2309.06657).
    """
    return F.relu(1 - options.beta * scores.margin)  # arXiv:2309.06657: hinge-norm


def ipo(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """IPO (Azar et al., arXiv:2310.12036): a margin of 1 / (2 beta), no more.

    With lengths the log-ratios are means over tokens. The paper has no lengths, and neither has the
    code of DPO's authors; but a target of fixed size means little for sums that grow with the
    completion, and TRL reports that IPO's authors meant, and measured, the means.
    """
    margin = _per_token(scores.chosen) - _per_token(scores.rejected)
    return (margin - 1 / (2 * options.beta)).square()  # Eq. 17, where beta is tau


def _per_token(completion: CompletionScores) -> Tensor:
    if completion.lengths is None:
        return completion.logratios
    return completion.logratios / completion.lengths.clamp(min=1)


def cdpo(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """Conservative DPO (Mitchell, https://ericmitchell.ai/cdpo.pdf).

    The preference is believed to be the wrong way round with probability ``label_smoothing``, so
    the loss is least where sigmoid(beta margin) = 1 - label_smoothing, not at infinity.
    """
    reward_margin = options.beta * scores.margin
    right, wrong = F.logsigmoid(reward_margin), F.logsigmoid(-reward_margin)
    return -(1 - options.label_smoothing) * right - options.label_smoothing * wrong  # Eq. 3


LOSSES: dict[str, Callable[[PairScores, PreferenceOptions], Tensor]] = {
    "cdpo": cdpo,
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid": sigmoid,
}


def pair_losses(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """Loss of each pair, (P,).

    Args:
        scores: Scores of both completions.
        options: Which loss, and its constants.
    """
    return LOSSES[options.loss_type](scores, options)


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """Loss of each pair, from four log-probabilities of whole completions.

    Args:
        chosen_logps: Under the policy, of the preferred completion, (P,).
        rejected_logps: Under the policy, of the other one.
        ref_chosen_logps: Under the reference, of the preferred completion.
        ref_rejected_logps: Under the reference, of the other one.
        loss_type: A name in ``LOSSES``: cdpo, hinge, ipo or sigmoid.
        beta: Strength of the pull to the reference; IPO's tau.
        label_smoothing: Probability that a preference is the wrong way round, for cdpo.
        chosen_lengths: Tokens of the preferred completions, (P,), for ipo: makes its log-ratios
            means over tokens.
        rejected_lengths: Tokens of the other ones.

    Returns:
        Losses, (P,).

    Raises:
        ValueError: If an argument is outside its range, or is not one of the loss.
    """
    where = "preference_loss"
    options = PreferenceOptions(loss_type, beta, label_smoothing, where)
    chosen = CompletionScores(chosen_logps, ref_chosen_logps, chosen_lengths)
    rejected = CompletionScores(rejected_logps, ref_rejected_logps, rejected_lengths)
    scores = PairScores(chosen, rejected, where)
    if chosen_lengths is not None and loss_type not in losses_that_read("lengths"):
        rule = f"must be left out with loss_type={loss_type!r}, which has no lengths"
        raise argument_error(where, "chosen_lengths", "...", rule)
    return pair_losses(scores, options)
