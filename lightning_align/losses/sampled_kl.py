"""KL(policy || reference), estimated on completions that the policy itself has sampled.

On any other completions the same sums estimate no KL: its mean is over what the policy writes.

Shapes: B completions, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_align._errors import argument_error

# What is added up of each completion: k3, its square, k1, its square, tokens, and 1.
NUM_SUMS = 6


@dataclass(frozen=True)
class KLEstimate:
    """An estimate of KL(policy || reference), in nats per completion.

    Attributes:
        kl: By k3, the sum over tokens of r - 1 - log r with r = p_ref / p.
        standard_error: Of ``kl``: of another draw of prompts and completions.
        k1: By k1, -log r of whole completions. Also unbiased and noisier; it may be negative.
        k1_standard_error: Of ``k1``.
        per_token: ``kl`` over the mean number of tokens.
        num_completions: On how many it rests.
    """

    kl: float
    standard_error: float
    k1: float
    k1_standard_error: float
    per_token: float
    num_completions: int


def kl_sums(policy_logps_BT: Tensor, ref_logps_BT: Tensor, completion_BT: Tensor) -> Tensor:
    """Sums over sampled completions, (6,) in fp64; those of several batches and ranks add up.

    Schulman's k1 and k3 (http://joschu.net/blog/kl-approx.html) of each token. Given what stands
    before it, a sampled token's k3 has the KL of the next-token distributions as its mean, and
    these KLs add up to that of the completions: the chain rule. Every term is positive, so that
    little cancels.

    Args:
        policy_logps_BT: Log-probability of each sampled token under the policy that sampled it.
        ref_logps_BT: Under the reference.
        completion_BT: Which of the entries are of sampled tokens.
    """
    completion_BT = completion_BT.bool()
    log_r_BT = (ref_logps_BT.double() - policy_logps_BT.double()).masked_fill(~completion_BT, 0)
    k1_B = -log_r_BT.sum(1)
    k3_B = (log_r_BT.expm1() - log_r_BT).sum(1)
    ones = torch.ones_like(k1_B)
    terms = [k3_B, k3_B.square(), k1_B, k1_B.square(), completion_BT.sum(1), ones]
    return torch.stack([term.double() for term in terms]).sum(1)


def kl_from_sums(sums: Tensor) -> KLEstimate:
    """The estimate from what ``kl_sums`` gave, added up.

    Args:
        sums: Over at least two completions, or a standard error is not known and infinite.

    Raises:
        ValueError: If there is no completion.
    """
    k3, k3_squares, k1, k1_squares, tokens, count = sums.tolist()
    if count < 1:
        raise argument_error("kl_from_sums", "sums", sums.tolist(), "must be of completions")
    return KLEstimate(
        kl=k3 / count,
        standard_error=_standard_error(k3, k3_squares, count),
        k1=k1 / count,
        k1_standard_error=_standard_error(k1, k1_squares, count),
        per_token=k3 / max(tokens, 1),
        num_completions=int(count),
    )


def _standard_error(total: float, squares: float, count: float) -> float:
    """Of the mean of ``count`` values, from the unbiased variance."""
    if count < 2:
        return float("inf")
    variance = max(squares - total * total / count, 0.0) / (count - 1)
    return float((variance / count) ** 0.5)
