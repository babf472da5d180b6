"""Losses of single completions that somebody found good or bad, without another to compare with.

Shapes: P records, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_align._errors import argument_error
from lightning_align.losses.means import Mean
from lightning_align.losses.options import UNPAIRED_READS, PreferenceArguments, PreferenceOptions
from lightning_align.losses.pair_statistics import length_correlation
from lightning_align.losses.scores import check_finite, frozen_logps
from lightning_align.losses.sequence_logps import CompletionLogps


@dataclass(frozen=True, eq=False)
class UnpairedScores:
    """All that is known about some records.

    Attributes:
        logratios: Policy less reference, of the completion, in nats, (P,). Differentiable.
        labels: Whether the completion is a good one, (P,), boolean.
        kl: How far policy and reference are apart, in nats, a scalar without gradient.
    """

    logratios: Tensor
    labels: Tensor
    kl: Tensor | float = 0.0


def kto(scores: UnpairedScores, options: PreferenceOptions) -> Tensor:
    """KTO (Ethayarajh et al., arXiv:2402.01306): gains and losses against the KL as a zero.

    1 - sigmoid(beta (log-ratio - KL)) of a good completion, the other way round of a bad one.
    """
    return _doubt(scores.logratios - scores.kl, scores.labels, options)  # Eq. 7


def apo_zero_unpaired(scores: UnpairedScores, options: PreferenceOptions) -> Tensor:
    """APO-zero (D'Oosterlinck et al., arXiv:2408.06266) without pairs: KTO with a KL of 0."""
    return _doubt(scores.logratios, scores.labels, options)


def _doubt(logratios: Tensor, labels: Tensor, options: PreferenceOptions) -> Tensor:
    good = torch.sigmoid(-options.beta * logratios) * options.desirable_weight
    bad = torch.sigmoid(options.beta * logratios) * options.undesirable_weight
    return torch.where(labels, good, bad)


UNPAIRED_LOSSES: dict[str, Callable[[UnpairedScores, PreferenceOptions], Tensor]] = {
    "apo_zero_unpaired": apo_zero_unpaired,
    "kto": kto,
}


def kl_estimate(kl_logps: Tensor, ref_kl_logps: Tensor) -> Tensor:
    """KTO's estimate of KL(policy || reference), in nats, a scalar without gradient.

    The mean log-ratio of completions that belong to other prompts, and at least 0 (Sec. 4.1). It is
    biased, and the paper uses it all the same, for it costs no sampling.

    Args:
        kl_logps: Log-probabilities of these completions under the policy, (P,).
        ref_kl_logps: Under the reference.
    """
    logratios = kl_logps.detach() - ref_kl_logps
    return logratios.sum().div(max(1, len(logratios))).clamp(min=0)


def kl_of_scored(
    policy: CompletionLogps,
    reference: CompletionLogps | None,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``kl_estimate`` of rows with completions that belong to other prompts.

    Args:
        policy: Scored by the model in training; rows without a completion token do not count.
        reference: Scored by the reference; None with ``reference_free``.
        over_ranks: Adds up a vector (2,), the log-ratios and how many there are, over the ranks
            that make one estimate together; None for these rows alone.

    Raises:
        ValueError: If a log-probability of the reference is not finite.
    """
    counted_P = policy.lengths_B > 0
    frozen_P = torch.zeros_like(policy.logps_B)
    if reference is not None:
        frozen_P = frozen_logps(reference, "kl_of_scored")
    logratios = (policy.logps_B.detach() - frozen_P)[counted_P]
    sums = torch.stack([logratios.sum(), counted_P.sum().to(logratios)])
    if over_ranks is not None:
        sums = over_ranks(sums)
    return sums[0].div(sums[1].clamp(min=1)).clamp(min=0)


def with_margins(means: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means of metrics with those that are functions of other means, and without vectors.

    ``rewards/margins`` of unpaired records is the difference of the rewards; of pairs there is
    ``length/correlation``, that of the margin with the difference of lengths.

    Args:
        means: Of all metrics; vectors are what only ``length_correlation`` and a picture need.
    """
    margin = means["rewards/chosen"] - means["rewards/rejected"]
    numbers = {name: mean for name, mean in means.items() if mean.ndim == 0}
    if "length/moments" in means:
        numbers["length/correlation"] = length_correlation(means["length/moments"])
    return {"rewards/margins": margin, **numbers}


def unpaired_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    labels: Tensor,
    *,
    kl_logps: Tensor | None = None,
    ref_kl_logps: Tensor | None = None,
    **options: Unpack[PreferenceArguments],
) -> Tensor:
    """Loss of each record.

    Args:
        logps: Log-probability of the completion under the policy, (P,).
        ref_logps: Under the reference; None with ``reference_free=True``.
        labels: Whether the completion is a good one, (P,).
        kl_logps: For kto, of completions that belong to other prompts, under the policy.
        ref_kl_logps: The same under the reference.
        **options: Arguments of ``PreferenceOptions``; ``loss_type`` is kto or apo_zero_unpaired.

    Returns:
        Losses, (P,).

    Raises:
        ValueError: If an argument is outside its range or of another shape, the loss is one of
            pairs, or what it asks for is missing or, of the reference, not finite.

    Example:
        >>> import torch
        >>> logps, labels = torch.tensor([-2.0, -2.0]), torch.tensor([True, False])
        >>> unpaired_loss(logps, logps, labels, loss_type="apo_zero_unpaired")
        tensor([0.5000, 0.5000])
    """
    where = "unpaired_loss"
    checked = PreferenceOptions(**options, where=where)
    if not checked.is_unpaired:
        rule = f"must be a loss of unpaired records: {', '.join(UNPAIRED_READS)}"
        raise argument_error(where, "loss_type", checked.loss_type, rule)
    for name, value in (("ref_logps", ref_logps), ("labels", labels)):
        if value is not None and value.shape != logps.shape:
            rule = f"must be one for each record, as logps of shape {tuple(logps.shape)}"
            raise argument_error(where, f"{name}.shape", tuple(value.shape), rule)
    if checked.needs_reference and ref_logps is None:
        rule = "must be given, for rewards are log-ratios"
        raise argument_error(where, "ref_logps", None, rule, "Or set reference_free=True")
    if checked.needs_reference:
        for name, value in (("ref_logps", ref_logps), ("ref_kl_logps", ref_kl_logps)):
            check_finite(where, name, value)
    kl: Tensor | float = 0.0
    if "kto" in checked.loss_types:
        if kl_logps is None or (ref_kl_logps is None and checked.needs_reference):
            missing = "kl_logps" if kl_logps is None else "ref_kl_logps"
            rule = "must be given with loss_type='kto', which estimates the KL with it"
            raise argument_error(where, missing, None, rule, "Use 'apo_zero_unpaired' without")
        reference = ref_kl_logps if checked.needs_reference else None
        kl = kl_estimate(kl_logps, torch.zeros_like(kl_logps) if reference is None else reference)
    logratios = logps - ref_logps if checked.needs_reference and ref_logps is not None else logps
    scores = UnpairedScores(logratios, labels.bool(), kl)
    return UNPAIRED_LOSSES[checked.loss_types[0]](scores, checked)


def unpaired_step(
    policy: CompletionLogps,
    reference: CompletionLogps | None,
    labels_P: Tensor,
    options: PreferenceOptions,
    kl: Tensor | float = 0.0,
) -> tuple[Tensor, dict[str, Mean]]:
    """Losses and metrics of scored records.

    The metrics, detached, have the names and the meaning of ``preference_step``, where "chosen" are
    the good completions and "rejected" the bad ones; ``kl`` is the estimate that kto took.

    Args:
        policy: Scored by the model in training, one row a record.
        reference: The same rows scored by the frozen reference; None with ``reference_free``.
        labels_P: Whether each completion is a good one, (P,).
        options: Which loss, and its constants.
        kl: What ``kl_estimate`` said, for kto.

    Returns:
        Loss of each record, (P,), zero of those without a completion token, and the metrics.

    Raises:
        ValueError: If a log-probability of the reference is not finite, a reference is asked for
            and missing, or there is not one label for each row.
    """
    where = "unpaired_step"
    if labels_P.shape != policy.logps_B.shape:
        rule = f"must be one for each of {len(policy.logps_B)} rows"
        raise argument_error(where, "label.shape", tuple(labels_P.shape), rule)
    logratios_P = policy.logps_B
    if options.needs_reference:
        if reference is None:
            rule = f"must be given with loss_type={options.loss_type!r}"
            raise argument_error(where, "reference", None, rule, "Or set reference_free=True")
        logratios_P = policy.logps_B - frozen_logps(reference, where)
    labels_P, counted_P = labels_P.bool(), policy.lengths_B > 0
    scores = UnpairedScores(logratios_P, labels_P, kl)
    losses_P = UNPAIRED_LOSSES[options.loss_types[0]](scores, options) * counted_P
    return losses_P, _metrics(policy, options.beta * logratios_P, labels_P, kl)


@torch.no_grad()
def _metrics(
    policy: CompletionLogps, rewards_P: Tensor, labels_P: Tensor, kl: Tensor | float
) -> dict[str, Mean]:
    counted_P = policy.lengths_B > 0
    metrics = {}
    for side, is_side_P in (("chosen", labels_P), ("rejected", ~labels_P)):
        of_P = is_side_P & counted_P
        metrics[f"rewards/{side}"] = Mean((rewards_P * of_P).sum().float(), of_P.sum())
        metrics[f"logps/{side}"] = Mean((policy.logps_B * of_P).sum().float(), of_P.sum())
        lengths = (policy.lengths_B * of_P).sum()
        metrics[f"logits/{side}"] = Mean((policy.mean_logit_B * of_P).sum(), lengths)
    metrics["entropy"] = Mean(policy.entropy_B.sum(), policy.lengths_B.sum())
    metrics["kl"] = Mean((kl * counted_P).sum().float(), counted_P.sum())
    return metrics
