"""Preference losses: one function for each, from the scores of pairs and the options to the losses.

Most see a pair only through its margin, the difference of the rewards of its two completions; beta
times a log-ratio to the reference is DPO's implicit reward. Others see both rewards, or the
log-probabilities alone.

Shapes: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_align._errors import argument_error
from lightning_align.losses.divergences import DIVERGENCES, bounded_expm1
from lightning_align.losses.options import PreferenceOptions
from lightning_align.losses.scores import CompletionScores, PairScores

Loss = Callable[[PairScores, PreferenceOptions], Tensor]


# Functions of the margin


def sigmoid(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """DPO (Rafailov et al., arXiv:2305.18290): the pair's Bradley-Terry log-likelihood."""
    return -F.logsigmoid(options.beta * _margin(scores, options))  # Eq. 7


def sigmoid_norm(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """DPO on log-ratios that are means over tokens (Tülu 3, Lambert et al., arXiv:2411.15124)."""
    return -F.logsigmoid(options.beta * _margin_of_means(scores, options))


def hinge(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """SLiC's margin loss (Zhao et al., arXiv:2305.10425) on DPO's rewards: zero from a margin of 1.

    Normalised by a reference it is the hinge-norm of RSO (Liu et al., arXiv:2309.06657).
    """
    return F.relu(1 - options.beta * _margin(scores, options))  # arXiv:2309.06657: hinge-norm


def ipo(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """IPO (Azar et al., arXiv:2310.12036): a margin of 1 / (2 beta), no more.

    With lengths the log-ratios are means over tokens. The paper has no lengths, and neither has the
    code of DPO's authors; but a target of fixed size means little for sums that grow with the
    completion, and TRL reports that IPO's authors meant, and measured, the means.
    """
    margin = _margin_of_means(scores, options)
    return (margin - 1 / (2 * options.beta)).square()  # Eq. 17, where beta is tau


def cdpo(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """Conservative DPO (Mitchell, https://ericmitchell.ai/cdpo.pdf).

    The preference is believed to be the wrong way round with probability ``label_smoothing``, so
    the loss is least where sigmoid(beta margin) = 1 - label_smoothing, not at infinity.
    """
    return _smoothed(options.beta * _margin(scores, options), options)  # Eq. 3


def robust(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """Robust DPO (Chowdhury et al., arXiv:2403.00409): what flipped labels do is taken out again.

    If a share ``label_smoothing`` of the preferences was turned around, its mean is that of DPO's
    loss on the right ones.
    """
    reward_margin, flipped = options.beta * _margin(scores, options), options.label_smoothing
    right, wrong = -F.logsigmoid(reward_margin), -F.logsigmoid(-reward_margin)
    return ((1 - flipped) * right - flipped * wrong) / (1 - 2 * flipped)


def exo_pair(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """EXO (Ji et al., arXiv:2402.00856): the reverse KL of the preference to smoothed labels."""
    reward_margin, smoothing = options.beta * _margin(scores, options), options.label_smoothing
    right, wrong = F.logsigmoid(reward_margin), F.logsigmoid(-reward_margin)
    chosen = right.exp() * (right - math.log1p(-smoothing))
    return chosen + wrong.exp() * (wrong - math.log(smoothing))  # Eq. 16


def discopop(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """DiscoPOP (Lu et al., arXiv:2406.08414): DPO's loss and an exponential, mixed by margin."""
    reward_margin = options.beta * _margin(scores, options)
    logistic_share = torch.sigmoid(-reward_margin / options.discopop_tau)
    # exp(-margin) times its share as one exponential: alone the first overflows where it has none.
    exponential = (F.logsigmoid(reward_margin / options.discopop_tau) - reward_margin).exp()
    return -F.logsigmoid(reward_margin) * logistic_share + exponential  # Eq. 5


# Functions of both log-ratios


def nca_pair(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """NCA (Chen et al., arXiv:2402.05369): each reward against 0, so that none need fall."""
    chosen, rejected = _rewards(scores, options)
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def bco_pair(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """BCO (Jung et al., arXiv:2404.04656) on pairs, without its shift: is a completion good?"""
    chosen, rejected = _rewards(scores, options)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """SPPO (Wu et al., arXiv:2405.00675), where the winner wins with probability 1.

    Log-ratios of 1 / (2 beta) and its negative are wanted.
    """
    target = 0.5 / options.beta
    chosen, rejected = scores.chosen.logratios, scores.rejected.logratios
    return (chosen - target).square() + (rejected + target).square()  # Eq. 4.7


def apo_zero(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """APO-zero (D'Oosterlinck et al., arXiv:2408.06266): the chosen texts beat the model's own."""
    chosen, rejected = _rewards(scores, options)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)  # Eq. 7


def apo_down(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """APO-down (arXiv:2408.06266): the model's own texts beat the chosen ones, so both fall."""
    chosen, rejected = _rewards(scores, options)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)  # Eq. 8


# Functions of a batch


def aot(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """AOT (Melnyk et al., arXiv:2406.05882) on pairs: margins of the policy over the reference's.

    Not those of the same pair but those of the same rank in the batch: all quantiles shall rise.
    """
    margins = (scores.chosen.logps - scores.rejected.logps).sort().values
    if scores.chosen.ref_logps is not None and scores.rejected.ref_logps is not None:
        margins = margins - (scores.chosen.ref_logps - scores.rejected.ref_logps).sort().values
    return _smoothed(options.beta * margins, options)


def aot_unpaired(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """AOT (arXiv:2406.05882) without pairs: ranks of chosen against rejected log-ratios."""
    chosen, rejected = (side.logratios.sort().values for side in (scores.chosen, scores.rejected))
    return _smoothed(options.beta * (chosen - rejected), options)


# Functions of log-probabilities, without a reference


def sft(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """Negative log-likelihood of the chosen completions, a mean over tokens.

    It is RPO's second term (Pang et al., arXiv:2404.19733). With ``sft_mean="tokens"`` it is the
    mean over all of the batch, which each pair then has as its loss.
    """
    chosen = scores.chosen
    # Not weighed as ld_alpha weighs: a likelihood has no other completion.
    logps = chosen.logps if chosen.token_logps is None else chosen.token_logps.sum(-1)
    if options.sft_mean == "pairs" or chosen.lengths is None:
        losses = -chosen.per_token(logps)
        return losses if options.sft_mean == "pairs" else losses.mean().expand_as(losses)
    return (-logps.sum() / chosen.lengths.sum().clamp(min=1)).expand_as(logps)


def cpo(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """CPO (Xu et al., arXiv:2401.08417): DPO's loss as the reference becomes uniform."""
    margin = scores.chosen.logps - scores.rejected.logps
    return _smoothed(options.beta * margin, options)  # Eq. 3


def simpo(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """SimPO (Meng et al., arXiv:2405.14734): mean log-probabilities, and a margin to reach."""
    chosen, rejected = _mean_logps(scores)
    margin = options.beta * (chosen - rejected) - options.simpo_gamma
    return _smoothed(margin, options)  # Eq. 6


def alphapo(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """AlphaPO (Gupta et al., arXiv:2501.03884): SimPO, its reward bent by a power of p."""
    chosen, rejected = (_power_reward(logps, options) for logps in _mean_logps(scores))
    return _smoothed(options.beta * (chosen - rejected) - options.simpo_gamma, options)


def orpo(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """ORPO's odds-ratio term (Hong et al., arXiv:2403.07691), beta being its lambda.

    The odds are of the probability per token. Its other term is ``sft``.
    """
    chosen, rejected = (_log_odds(logps) for logps in _mean_logps(scores))
    return -options.beta * F.logsigmoid(chosen - rejected)  # Eq. 7


LOSSES: dict[str, Loss] = {
    "alphapo": alphapo,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_down": apo_down,
    "apo_zero": apo_zero,
    "bco_pair": bco_pair,
    "cdpo": cdpo,
    "cpo": cpo,
    "discopop": discopop,
    "exo_pair": exo_pair,
    "hinge": hinge,
    "ipo": ipo,
    "nca_pair": nca_pair,
    "orpo": orpo,
    "robust": robust,
    "sft": sft,
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "simpo": simpo,
    "sppo_hard": sppo_hard,
}


# What several of them share


def _margin(scores: PairScores, options: PreferenceOptions) -> Tensor:
    """Reward of the chosen less that of the rejected completion, over beta."""
    chosen, rejected = (_score(side, options) for side in (scores.chosen, scores.rejected))
    return _with_lengths(chosen - rejected, scores, options)


def _margin_of_means(scores: PairScores, options: PreferenceOptions) -> Tensor:
    chosen, rejected = (
        side.per_token(_score(side, options)) for side in (scores.chosen, scores.rejected)
    )
    return _with_lengths(chosen - rejected, scores, options)


def _score(side: CompletionScores, options: PreferenceOptions) -> Tensor:
    divergence = DIVERGENCES[options.f_divergence_type]
    return divergence(side.logratios, options.f_alpha_divergence_coef)


def _with_lengths(margin: Tensor, scores: PairScores, options: PreferenceOptions) -> Tensor:
    """R-DPO (Park et al., arXiv:2403.19159): part of the preference is for the longer text."""
    if options.length_alpha == 0:
        return margin
    if scores.chosen.lengths is None or scores.rejected.lengths is None:
        rule = "must be 0 where lengths are unknown"
        way_out = "Pass chosen_lengths and rejected_lengths"
        raise argument_error("preference_loss", "length_alpha", options.length_alpha, rule, way_out)
    longer = (scores.chosen.lengths - scores.rejected.lengths).to(margin.dtype)
    return margin + options.length_alpha / options.beta * longer


def _smoothed(reward_margin: Tensor, options: PreferenceOptions) -> Tensor:
    """Cross-entropy of the preference to labels that are wrong with a small probability."""
    right, wrong = F.logsigmoid(reward_margin), F.logsigmoid(-reward_margin)
    return -(1 - options.label_smoothing) * right - options.label_smoothing * wrong


def _rewards(scores: PairScores, options: PreferenceOptions) -> tuple[Tensor, Tensor]:
    return options.beta * scores.chosen.logratios, options.beta * scores.rejected.logratios


def _mean_logps(scores: PairScores) -> tuple[Tensor, Tensor]:
    chosen, rejected = scores.chosen, scores.rejected
    return chosen.per_token(chosen.logps), rejected.per_token(rejected.logps)


def _power_reward(logps: Tensor, options: PreferenceOptions) -> Tensor:
    """(1 - p^-alpha) / alpha from log p; TRL's comes by way of p, which underflows."""
    alpha = options.alphapo_alpha
    return logps if alpha == 0 else -bounded_expm1(-alpha * logps) / alpha


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, finite up to p = 1."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    is_small = logps < -math.log(2)  # from there on 1 - p has lost nothing
    # Both branches are differentiated, so each gets only what it is finite for.
    small = torch.log1p(-torch.where(is_small, logps, -1.0).exp())
    large = torch.log(-torch.expm1(torch.where(is_small, -0.5, logps)))
    return logps - torch.where(is_small, small, large)


def implicit_rewards(scores: PairScores, options: PreferenceOptions) -> tuple[Tensor, Tensor]:
    """Rewards of (chosen, rejected) completions that the first loss has in mind, each (P,).

    Args:
        scores: Scores of both completions.
        options: Which losses, and their constants.
    """
    first = options.loss_types[0]
    if first in ("simpo", "orpo"):
        chosen, rejected = _mean_logps(scores)
    elif first == "alphapo":
        chosen, rejected = (_power_reward(logps, options) for logps in _mean_logps(scores))
    elif first == "cpo":
        chosen, rejected = scores.chosen.logps, scores.rejected.logps
    else:
        return _rewards(scores, options)
    return options.beta * chosen, options.beta * rejected
