"""Learning rate as a function of the tokens learned from, as a fraction of its peak.

PyTorch's and transformers' schedulers count steps, so a run whose steps differ in size (short
batches, masked prompts, another number of ranks) gets another curve for the same text. Here the
argument is the number of tokens, and nothing else is remembered: the same number of tokens gives
the same learning rate, whatever came before.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(progress: float) -> float:
    """From 1 down to 0 along half a cosine, without restarts."""
    return 0.5 * (1 + math.cos(math.pi * progress))  # arXiv:1608.03983, Eq. 5


def linear(progress: float) -> float:
    """From 1 down to 0 along a straight line."""
    return 1 - progress


def one_minus_sqrt(progress: float) -> float:
    """From 1 down to 0, steep at first: the cooldown that arXiv:2405.18392 found to be the best."""
    return 1 - math.sqrt(progress)


# name -> share of the way that is left at a progress in [0, 1]; transformers' names.
DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "1-sqrt": one_minus_sqrt,
}
SCHEDULES = ("constant", "cosine", "linear", "wsd")


def lr_fraction(
    tokens: int,
    *,
    schedule: str,
    max_tokens: int,
    warmup_tokens: int,
    decay_tokens: int,
    decay_type: str,
    min_lr_ratio: float,
) -> float:
    """Learning rate after ``tokens`` tokens, divided by its peak.

    Warm-up and decay are lines and curves between ``min_lr_ratio`` and 1, as in transformers'
    ``get_wsd_schedule``: a warm-up does not spend its first step on a learning rate of zero.

    Args:
        tokens: Tokens learned from before the step whose learning rate is asked for.
        schedule: ``"constant"``, ``"cosine"``, ``"linear"`` or ``"wsd"``.
        max_tokens: Tokens at which a decay ends; from there on it is ``min_lr_ratio``.
        warmup_tokens: Tokens of the linear warm-up.
        decay_tokens: Tokens of the decay, for ``"wsd"``; the others decay from the warm-up on.
        decay_type: Shape of the decay, for ``"wsd"``: a name in ``DECAYS``.
        min_lr_ratio: Fraction at both ends.
    """
    if tokens < warmup_tokens:
        share = tokens / warmup_tokens
    elif schedule == "constant":
        share = 1.0
    else:
        # Warm-up, a plateau, then a decreasing function: arXiv:2404.06395, definition of WSD.
        start = max_tokens - decay_tokens if schedule == "wsd" else warmup_tokens
        shape = DECAYS[decay_type if schedule == "wsd" else schedule]
        progress = (tokens - start) / max(1, max_tokens - start)
        share = shape(min(1.0, max(0.0, progress)))
    return share + min_lr_ratio * (1 - share)  # in this form exact at both ends
