"""Adam's moments in a subspace: the step they give, and how they follow the subspace.

Shapes: a moment has that of the projected gradient (projection.py), (rank, cols) on the left side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_align.optimizers.adamw import State, adamw_
from lightning_align.optimizers.projection import Basis


def adam_direction(
    projected: Tensor, state: State, betas: tuple[float, float], eps: float
) -> Tensor:
    """Adam's step of length 1 in the subspace, for the step number in ``state``.

    The second half of AdamW's own kernel, on a weight of zeros. It adds eps after bias correction;
    galore-torch before, which is eps divided by the root of the correction.
    """
    step = float(state["step"])
    direction = torch.zeros_like(projected)
    inner = {
        "step": torch.full((), step - 1, dtype=torch.float32, device=projected.device),
        "exp_avg": state["exp_avg"],
        "exp_avg_sq": state["exp_avg_sq"],
    }
    corrected_eps = eps / math.sqrt(1 - betas[1] ** step)
    adamw_(
        [direction], [projected], [inner], lr=1.0, betas=betas, eps=corrected_eps, weight_decay=0
    )
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
