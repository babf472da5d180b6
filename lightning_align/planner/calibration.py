"""Constants of hardware from a few measured steps: the most probable ones, given what was known.

Minimised is the sum of two kinds of squares: of relative errors of the predicted steps, far ones
counting less (their logarithm is divided by ``ROW_SPREAD``), and of how far each constant moves
from what is known of it (``Prior``). So few rows move little, and no constant leaves its bounds.
Levenberg and Marquardt's steps on logarithms of the constants; derivatives are differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lightning_align.planner.efficiencies import PRIORS, Efficiencies

Floats = NDArray[np.float64]
ROW_SPREAD = 0.04  # of a measured step, relative to what sizes can explain
STEP = 1e-2  # of a logarithm, for derivatives
LARGEST_STEPS = 40
LAUNCH_FACTORS = (1, 1 / 8, 1 / 4, 1 / 2, 2, 4, 8)
SETTLED = 5e-3  # of all logarithms, below which nothing moves any more


@dataclass(frozen=True)
class Fit:
    """What ``fitted`` found.

    Attributes:
        constants: The most probable ones.
        errors: Predicted over measured, less 1, of each row.
        directions: In how many directions of the constants the rows say more than was known.
    """

    constants: Efficiencies
    errors: tuple[float, ...]
    directions: int


def fitted(
    predict: Callable[[Efficiencies], Sequence[float]],
    seconds: Sequence[float],
    start: Efficiencies,
) -> Fit:
    """Constants under which predictions come close to what was measured.

    Args:
        predict: Seconds of each row under given constants.
        seconds: Of each row as measured.
        start: Constants before anything is measured.
    """
    names = list(PRIORS)
    low, high = (np.log([getattr(PRIORS[name], end) for name in names]) for end in ("low", "high"))
    spread = np.log([PRIORS[name].factor for name in names])
    known = np.log([getattr(start, name) for name in names])
    measured = np.log(np.asarray(seconds, dtype=np.float64))

    def constants(at: Floats) -> Efficiencies:
        return replace(start, **dict(zip(names, np.exp(at).tolist(), strict=True)))

    def residuals(at: Floats) -> tuple[Floats, Floats]:
        predicted = np.log(np.asarray(predict(constants(at)), dtype=np.float64))
        return (predicted - measured) / ROW_SPREAD, (at - known) / spread

    # Small layers are bound by launches or not, and no slope leads from one to the other.
    launch = np.eye(len(known))[names.index("launch_s")]
    starts = [np.clip(known + shift * launch, low, high) for shift in np.log(LAUNCH_FACTORS)]
    at = min(starts, key=lambda start: _loss(*residuals(start)))
    damping = 1e-3
    rows, prior = residuals(at)
    for _ in range(LARGEST_STEPS):
        slopes = np.stack(
            [(residuals(at + STEP * axis)[0] - rows) / STEP for axis in np.eye(len(at))], axis=1
        )
        weights = 1 / np.sqrt(1 + rows**2)  # of a pseudo-Huber loss
        curvature = slopes.T @ (weights[:, None] * slopes) + np.diag(spread**-2)
        downhill = -(slopes.T @ (weights * rows) + prior / spread)
        loss, moved = _loss(rows, prior), at
        while damping < 1e8:
            diagonal = damping * np.diag(np.diag(curvature))
            moved = np.clip(at + np.linalg.solve(curvature + diagonal, downhill), low, high)
            rows, prior = residuals(moved)
            if _loss(rows, prior) <= loss:
                damping = max(damping / 5, 1e-9)
                break
            damping *= 4
        is_settled = float(np.abs(moved - at).max()) < SETTLED
        at = moved
        if is_settled:
            break
    told = np.linalg.svd(slopes * spread, compute_uv=False) > 1.0
    return Fit(constants(at), tuple(np.expm1(rows * ROW_SPREAD).tolist()), int(told.sum()))


def _loss(rows: Floats, prior: Floats) -> float:
    """Twice the negative logarithm of the probability, but for a constant."""
    return float((2 * (np.sqrt(1 + rows**2) - 1)).sum() + (prior**2).sum())
