"""What a preference loss sees of a pair: the scores of two completions of one prompt.

A loss is a function of these scores and of ``PreferenceOptions``: one that wants lengths, or the
terms of single tokens, finds them here, without a new argument on the way from the module.

Shapes: P pairs, B = 2 P sequences, [chosen; rejected]; T tokens.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, fields, replace

import torch
from torch import Tensor

from lightning_align._errors import argument_error
from lightning_align.losses.sequence_logps import (
    CompletionLogps,
    check_pairs,
    length_desensitized,
)


@dataclass(frozen=True, eq=False)
class CompletionScores:
    """One completion of every pair, under the policy and under the frozen reference.

    Attributes:
        logps: Log-probability under the policy, in nats, (P,). Differentiable.
        ref_logps: Under the reference, (P,); None for one that finds all completions alike.
        lengths: Completion tokens, (P,); None if nobody has counted.
        token_logps: Log-probability of each token under the policy, (P, T - 1), zero outside the
            completion. Differentiable. None where only sums are known.
        ref_token_logps: Under the reference.
        log_weights: Logarithm of WPO's weight, (P,), without gradient; None where nobody weighs.
    """

    logps: Tensor
    ref_logps: Tensor | None
    lengths: Tensor | None = None
    token_logps: Tensor | None = None
    ref_token_logps: Tensor | None = None
    log_weights: Tensor | None = None

    @property
    def logratios(self) -> Tensor:
        """Policy less reference, (P,), in nats; times beta it is DPO's implicit reward."""
        return self.logps if self.ref_logps is None else self.logps - self.ref_logps

    def per_token(self, values_P: Tensor) -> Tensor:
        """Values over the number of tokens, (P,); as they are if nobody has counted those."""
        if self.lengths is None:
            return values_P
        return values_P / self.lengths.clamp(min=1)


@dataclass(frozen=True, eq=False)
class PairScores:
    """All that is known about some pairs. Row i of both sides is a completion of prompt i.

    Args:
        chosen: The preferred completions.
        rejected: The other ones.
        where: Function the user called, for the message of an error.

    Raises:
        ValueError: If the sides have not the same fields, or a field has not the shape that the
            others ask for.
    """

    chosen: CompletionScores
    rejected: CompletionScores
    where: InitVar[str] = "PairScores"

    def __post_init__(self, where: str) -> None:
        pairs = self.chosen.logps.shape
        for field in fields(CompletionScores):
            left, right = getattr(self.chosen, field.name), getattr(self.rejected, field.name)
            names = [_argument(side, field.name) for side in ("chosen", "rejected")]
            if (left is None) != (right is None):
                missing = names[0] if left is None else names[1]
                rule = f"both {field.name} must be given, or neither"
                raise argument_error(where, missing, None, rule)
            for name, value in zip(names, (left, right), strict=True):
                if value is None:
                    continue
                if (value.shape[:-1] if "token" in name else value.shape) != pairs:
                    rule = f"must be one for each pair, as chosen_logps of shape {tuple(pairs)}"
                    raise argument_error(where, f"{name}.shape", tuple(value.shape), rule)

    @property
    def margin(self) -> Tensor:
        """Difference of the log-ratios, chosen less rejected, (P,): h in IPO's Eq. 17."""
        return self.chosen.logratios - self.rejected.logratios

    def take(self, pairs_P: Tensor) -> PairScores:
        """Those of the pairs where ``pairs_P`` is True."""
        return PairScores(_take(self.chosen, pairs_P), _take(self.rejected, pairs_P))


def _take(completion: CompletionScores, pairs_P: Tensor) -> CompletionScores:
    values = {field.name: getattr(completion, field.name) for field in fields(completion)}
    kept = {name: value[pairs_P] for name, value in values.items() if value is not None}
    return replace(completion, **kept)


def pair_scores(
    policy: CompletionLogps,
    reference: CompletionLogps | None,
    where: str = "pair_scores",
    *,
    ld_alpha: float | None = None,
) -> PairScores:
    """Scores of pairs whose completions stand in rows [chosen; rejected].

    Args:
        policy: Scored by the model in training. Its log-probabilities keep their gradients.
        reference: The same rows scored by the frozen reference, which gets no gradient; None for
            one that finds all completions alike.
        where: Function the user called, for the message of an error.
        ld_alpha: Weight of tokens beyond the length of the other completion, see
            ``length_desensitized``; None for 1.

    Raises:
        ValueError: If the number of rows is odd, or a log-probability of the reference is not
            finite.
    """
    check_pairs(where, "policy.logps_B.shape", policy.logps_B)
    columns_B = [policy.logps_B, None, policy.lengths_B, policy.token_logps_BT, None]
    columns_B.append(policy.log_weights_B)
    if reference is not None:
        columns_B[1] = frozen_logps(reference, where)
        columns_B[4] = reference.token_logps_BT.detach()
    if ld_alpha is not None:
        columns_B[0] = length_desensitized(policy, ld_alpha)
        if reference is not None:
            columns_B[1] = length_desensitized(reference, ld_alpha).detach()
    halves = [(None, None) if c is None else c.chunk(2) for c in columns_B]
    chosen, rejected = zip(*halves, strict=True)
    return PairScores(CompletionScores(*chosen), CompletionScores(*rejected), where)


def frozen_logps(reference: CompletionLogps, where: str) -> Tensor:
    """Log-probabilities of completions under the reference, (B,), without gradient.

    Args:
        reference: Scored by the reference.
        where: Function the user called, for the message of an error.

    Raises:
        ValueError: If one is not finite: both models at -inf would give a loss of nan.
    """
    check_finite(where, "reference.logps_B", reference.logps_B)
    return reference.logps_B.detach()


def check_finite(where: str, name: str, ref_logps: Tensor | None) -> None:
    """Refuse log-probabilities under the reference that are not finite; None is none.

    Args:
        where: Function the user called.
        name: Name of the argument.
        ref_logps: Of completions, in nats, of any shape.

    Raises:
        ValueError: If one is not finite.
    """
    if ref_logps is not None and not torch.isfinite(ref_logps).all():
        rule = "must be finite; the reference gives some completion no probability, or is broken"
        raise argument_error(where, name, ref_logps.tolist(), rule)


def _argument(side: str, field: str) -> str:
    """A field's name as ``preference_loss`` has it, such as ref_chosen_logps."""
    return f"ref_{side}_{field.removeprefix('ref_')}" if "ref_" in field else f"{side}_{field}"
