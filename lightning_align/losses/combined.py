"""Several preference losses at once: their weighted sum, with WPO's weights of pairs.

Shapes: P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_align._errors import argument_error
from lightning_align.losses.options import PreferenceArguments, PreferenceOptions
from lightning_align.losses.preference import LOSSES
from lightning_align.losses.scores import CompletionScores, PairScores, check_finite


def pair_losses(
    scores: PairScores, options: PreferenceOptions, counted_P: Tensor | None = None
) -> Tensor:
    """Loss of each pair, (P,): the weighted sum over all losses of the options.

    Args:
        scores: Scores of both completions.
        options: Which losses, and their constants.
        counted_P: Pairs that there are; losses of a whole batch leave the others out. None for all.
    """
    return weighted_sum(loss_terms(scores, options, counted_P), options)


def loss_terms(
    scores: PairScores, options: PreferenceOptions, counted_P: Tensor | None = None
) -> dict[str, Tensor]:
    """Losses of each pair, (P,), by name, before their ``loss_weights``.

    Args:
        scores: Scores of both completions.
        options: Which losses, and their constants.
        counted_P: As in ``pair_losses``.
    """
    terms = {name: _one_loss(name, scores, options, counted_P) for name in options.loss_types}
    if options.use_weighting:
        weights_P = _pair_weights(scores)
        terms = {name: losses_P * weights_P for name, losses_P in terms.items()}
    return terms


def weighted_sum(terms: dict[str, Tensor], options: PreferenceOptions) -> Tensor:
    """The loss of each pair, (P,), from those that ``loss_terms`` returned."""
    weighted = [
        w * terms[name] for name, w in zip(options.loss_types, options.weights, strict=True)
    ]
    return torch.stack(weighted).sum(0)


def _one_loss(
    name: str, scores: PairScores, options: PreferenceOptions, counted_P: Tensor | None
) -> Tensor:
    if counted_P is None or name not in options.coupled_losses:
        return LOSSES[name](scores, options)
    losses_P = torch.zeros_like(scores.chosen.logps)
    return losses_P.index_put((counted_P,), LOSSES[name](scores.take(counted_P), options))


def _pair_weights(scores: PairScores) -> Tensor:
    """WPO's weight of each pair (Zhou et al., arXiv:2406.11827, Eq. 2), without gradient."""
    if scores.chosen.log_weights is None or scores.rejected.log_weights is None:
        rule = "must be False where the policy's distributions are unknown"
        way_out = "Use dpo_loss_from_batch or DPOModule, or pass chosen_log_weights"
        raise argument_error("preference_loss", "use_weighting", True, rule, way_out)
    return (scores.chosen.log_weights + scores.rejected.log_weights).detach().exp()


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    chosen_log_weights: Tensor | None = None,
    rejected_log_weights: Tensor | None = None,
    **options: Unpack[PreferenceArguments],
) -> Tensor:
    """Loss of each pair, from four log-probabilities of whole completions.

    Every option may be given with every loss; each loss takes what is its own. Losses of a whole
    batch (aot, aot_unpaired, sft) have meaning in their mean.

    Args:
        chosen_logps: Under the policy, of the preferred completion, (P,).
        rejected_logps: Under the policy, of the other one.
        ref_chosen_logps: Under the reference, of the preferred completion; None if no loss asks.
        ref_rejected_logps: Under the reference, of the other one.
        chosen_lengths: Tokens of the preferred completions, (P,): ipo, sigmoid_norm, simpo,
            alphapo, orpo and sft then take means over tokens; without, values count as they are.
        rejected_lengths: Tokens of the other ones.
        chosen_log_weights: Logarithms of WPO's weights of the preferred completions, (P,), for
            use_weighting.
        rejected_log_weights: Those of the other ones.
        **options: Arguments of ``PreferenceOptions``: loss_type, beta, label_smoothing and more.

    Returns:
        Losses, (P,).

    Raises:
        ValueError: If an argument is outside its range or of another shape, a loss is unknown or of
            unpaired records, or what it asks for is missing or, of the reference, not finite.

    Example:
        >>> import torch
        >>> logps = torch.tensor([-3.0]), torch.tensor([-6.0])
        >>> preference_loss(*logps, loss_type=["cpo", "sft"], loss_weights=[1, 0.1], beta=1.0)
        tensor([0.3486])
    """
    where = "preference_loss"
    checked = PreferenceOptions(**options, where=where)
    if checked.is_unpaired:
        rule = "must be a loss of pairs"
        raise argument_error(where, "loss_type", checked.loss_type, rule, "Use unpaired_loss")
    references = ref_chosen_logps, ref_rejected_logps
    if checked.needs_reference and ref_chosen_logps is ref_rejected_logps is None:
        rule = f"must be given with loss_type={checked.loss_type!r}"
        raise argument_error(where, "ref_chosen_logps", None, rule, "Or set reference_free=True")
    if not checked.needs_reference:
        references = None, None
    for name, values in zip(("ref_chosen_logps", "ref_rejected_logps"), references, strict=True):
        check_finite(where, name, values)
    chosen = CompletionScores(
        chosen_logps, references[0], chosen_lengths, log_weights=chosen_log_weights
    )
    rejected = CompletionScores(
        rejected_logps, references[1], rejected_lengths, log_weights=rejected_log_weights
    )
    return pair_losses(PairScores(chosen, rejected, where), checked)
