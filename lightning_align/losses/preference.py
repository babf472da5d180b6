"""Preference losses: one function for each, from log-ratios of a pair to its loss.

A log-ratio is log policy(completion) - log reference(completion), summed over the completion; beta
times it is DPO's implicit reward. Every loss sees a pair only through the difference of its two
log-ratios, ``margin`` below, h in IPO's Eq. 17.

Shapes: P pairs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_align._errors import argument_error, finite_number


def sigmoid(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """DPO (Rafailov et al., arXiv:2305.18290): the pair's Bradley-Terry log-likelihood."""
    margin = chosen_logratios - rejected_logratios
    return -F.logsigmoid(beta * margin)  # Eq. 7


def hinge(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """SLiC's margin loss (Zhao et al., arXiv:2305.10425) on DPO's rewards: zero from a margin of 1.

    Normalised by a reference it is the hinge-norm of RSO (Liu et al., arXiv:2309.06657).
    """
    margin = chosen_logratios - rejected_logratios
    return F.relu(1 - beta * margin)  # arXiv:2309.06657: hinge-norm


def ipo(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """IPO (Azar et al., arXiv:2310.12036): a margin of 1 / (2 beta), no more.

    With lengths the log-ratios are means over tokens. The paper has no lengths, and neither has the
    code of DPO's authors; but a target of fixed size means little for sums that grow with the
    completion, and TRL reports that IPO's authors meant, and measured, the means.
    """
    if chosen_lengths is not None and rejected_lengths is not None:
        chosen_logratios = chosen_logratios / chosen_lengths.clamp(min=1)
        rejected_logratios = rejected_logratios / rejected_lengths.clamp(min=1)
    margin = chosen_logratios - rejected_logratios
    return (margin - 1 / (2 * beta)).square()  # Eq. 17, where beta is tau


def cdpo(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Conservative DPO (Mitchell, https://ericmitchell.ai/cdpo.pdf).

    The preference is believed to be the wrong way round with probability ``label_smoothing``, so
    the loss is least where sigmoid(beta margin) = 1 - label_smoothing, not at infinity.
    """
    reward_margin = beta * (chosen_logratios - rejected_logratios)
    right, wrong = F.logsigmoid(reward_margin), F.logsigmoid(-reward_margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong  # Eq. 3


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cdpo": cdpo,
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid": sigmoid,
}


def uses(loss_type: str, argument: str) -> bool:
    """Whether a loss has an argument of that name."""
    return argument in inspect.signature(LOSSES[loss_type]).parameters


def check_preference_arguments(
    where: str, loss_type: str, beta: float, label_smoothing: float
) -> None:
    """Refuse what ``preference_loss`` would refuse, for who wants to know it at construction.

    Args:
        where: Class or function the user called.
        loss_type: Key of ``LOSSES``.
        beta: Strength of the pull to the reference.
        label_smoothing: Probability that a preference is the wrong way round.

    Raises:
        ValueError: If the loss is unknown, beta is not positive and finite, or the smoothing is
            outside [0, 0.5) or given for a loss without it.
    """
    if loss_type not in LOSSES:
        names = ", ".join(repr(name) for name in LOSSES)
        raise argument_error(where, "loss_type", loss_type, f"must be one of {names}")
    if (finite_number(beta) or 0) <= 0:
        raise argument_error(where, "beta", beta, "must be positive and finite")
    if not 0 <= label_smoothing < 0.5:
        raise argument_error(where, "label_smoothing", label_smoothing, "must be in [0, 0.5)")
    if label_smoothing and not uses(loss_type, "label_smoothing"):
        rule = f"must be 0 with loss_type={loss_type!r}, which has no smoothing"
        raise argument_error(where, "label_smoothing", label_smoothing, rule, "Use 'cdpo'")


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
    check_preference_arguments(where, loss_type, beta, label_smoothing)
    options: dict[str, float | Tensor] = {"beta": beta}
    if label_smoothing:
        options["label_smoothing"] = label_smoothing
    if (chosen_lengths is None) != (rejected_lengths is None):
        missing = "chosen_lengths" if chosen_lengths is None else "rejected_lengths"
        raise argument_error(where, missing, None, "both lengths must be given, or neither")
    if chosen_lengths is not None and rejected_lengths is not None:
        if not uses(loss_type, "chosen_lengths"):
            rule = f"must be left out with loss_type={loss_type!r}, which has no lengths"
            raise argument_error(where, "chosen_lengths", "...", rule)
        options |= {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    return LOSSES[loss_type](
        chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps, **options
    )
