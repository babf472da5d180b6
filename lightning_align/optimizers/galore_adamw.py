"""The arithmetic of GaLore's AdamW: its step, in a subspace or not, and a change of subspace.

Shapes: a moment has that of what it is the moment of; in a subspace that of the projected gradient
(projection.py), which is (rank, cols) on the left side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_align.optimizers.adamw import State, adamw_
from lightning_align.optimizers.projection import Basis


def galore_adamw_(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """A step of AdamW in place, as galore-torch takes it from an old transformers.

    It differs from torch's in two places: eps is added before bias correction, which is a larger
    eps at the beginning, and what decays is the weight after the step.

    Args:
        weights: What moves.
        gradients: One for each weight, of its shape.
        states: One for each weight; "step" counts this step already, and is the same in all.
        lr: Learning rate.
        betas: Decay of the first and of the second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Share of the weight that lr times this takes away.
    """
    step = float(states[0]["step"])
    before = [  # the kernel counts by itself, on the device of the weight
        {**state, "step": torch.full((), step - 1, dtype=torch.float32, device=weight.device)}
        for weight, state in zip(weights, states, strict=True)
    ]
    # (1 - lr d) (w - lr u) = (1 - lr d) w - lr (1 - lr d) u, with d the decay, u Adam's step
    kept = 1 - lr * weight_decay
    eps = eps / math.sqrt(1 - betas[1] ** step)
    decay = weight_decay / kept if kept else 0.0
    adamw_(weights, gradients, before, lr=lr * kept, betas=betas, eps=eps, weight_decay=decay)
    if not kept:  # all of the weight decays
        torch._foreach_zero_(weights)


def adam_direction(
    projected: Tensor, state: State, betas: tuple[float, float], eps: float
) -> Tensor:
    """Adam's step of length 1 in the subspace: AdamW's, for a weight of zeros."""
    direction = torch.zeros_like(projected)
    galore_adamw_([direction], [projected], [state], lr=1.0, betas=betas, eps=eps, weight_decay=0.0)
    return direction


def rotate_moments_(state: State, old: Basis, new: Basis, betas: tuple[float, float]) -> None:
    """Carry both moments from the old basis into the new one (LDAdam, arXiv:2410.16103, section 3).

    With Q = new^T old, the mean of the new coordinates is Q times that of the old, and so is their
    variance, with Q squared entry by entry, if the old ones vary independently: the approximation.
    LDAdam leaves a direction that the old basis had not seen without a second moment, and the first
    step there is then several times too long; ours gets the average of those that were seen.
    """
    step = float(state["step"])
    corrections = [1 - beta**step for beta in betas]
    mean, second = state["exp_avg"] / corrections[0], state["exp_avg_sq"] / corrections[1]
    turns = [None if n is None or o is None else n.T @ o for n, o in zip(new, old, strict=True)]
    squares = [None if turn is None else turn.square() for turn in turns]
    seen = _turned(torch.ones_like(second), *squares)
    axes = [axis for axis, turn in enumerate(turns) if turn is not None]
    variance = _turned((second - mean.square()).clamp_(min=0), *squares)
    mean = _turned(mean, *turns)
    unseen = (1 - seen).clamp_(min=0) * second.mean(axes, keepdim=True)
    state["exp_avg"] = mean * corrections[0]
    state["exp_avg_sq"] = (variance + mean.square() + unseen) * corrections[1]


def _turned(moment: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    if left is not None:
        moment = left @ moment
    return moment if right is None else moment @ right.T
