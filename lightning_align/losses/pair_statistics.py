"""What a mean over pairs hides: do both completions fall, is the longer one preferred, how far.

All are sums over pairs, so that they merge over batches and ranks as any ``Mean``. Two are vectors:
moments, out of which a correlation is made once all are added, and the counts of a histogram.

Shapes: P pairs, M = ``MARGIN_BINS``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_align.losses.means import Mean
from lightning_align.losses.scores import PairScores

# Bins are as wide as a margin is large, but for those next to 0: margins of 0.1 and of 100 are both
# told apart. Bin M / 2 begins at 0; what lies beyond the ends is in the first and last one.
MARGIN_BINS = 120
_UNIT, _LIMIT = 0.1, 1000.0
_WIDTH = 2 * math.asinh(_LIMIT / _UNIT) / MARGIN_BINS

# Squares of fp32 sums lose this much: a smaller variance than so times the square is rounding.
_ROUNDING = 1e-5


def margin_edges() -> Tensor:
    """Margins of rewards between which the bins of ``rewards/histogram`` lie, (M + 1,)."""
    steps = torch.arange(MARGIN_BINS + 1, dtype=torch.float64) - MARGIN_BINS // 2
    return _UNIT * torch.sinh(steps * _WIDTH)


def margin_counts(margin_P: Tensor, counted_P: Tensor) -> Tensor:
    """How many pairs have their margin in each bin of ``margin_edges``, (M,).

    Args:
        margin_P: Margins of rewards. One that is not a number is in no bin.
        counted_P: Pairs that there are.
    """
    margin_P = margin_P.float()
    places = (torch.asinh(margin_P / _UNIT) / _WIDTH).floor().nan_to_num() + MARGIN_BINS // 2
    counts = counted_P & ~margin_P.isnan()
    bins_P = places.clamp(0, MARGIN_BINS - 1).long()
    zeros_M = torch.zeros(MARGIN_BINS, dtype=torch.float32, device=margin_P.device)
    return zeros_M.index_add(0, bins_P, counts.float())


def pair_statistics(scores: PairScores, margin_P: Tensor, counted_P: Tensor) -> dict[str, Mean]:
    """Sums over pairs, as means that can still be merged.

    - ``logps/both_fell``: share of pairs of which both completions are less likely than under the
      reference; absent without one;
    - ``length/accuracy``: share of pairs whose chosen completion is the longer one, of equal ones a
      half: what "the longer one is better" would get right;
    - ``length/moments``: of margin and difference of lengths, for ``length_correlation``, (5,);
    - ``rewards/histogram``: pairs by their margin of rewards, (M,).

    Args:
        scores: Scores of both completions; without lengths there is nothing on lengths.
        margin_P: Reward of the chosen less that of the rejected completion.
        counted_P: Pairs that there are; the others add nothing.
    """
    chosen, rejected = scores.chosen, scores.rejected
    num_pairs = counted_P.sum()
    statistics = {}
    if chosen.ref_logps is not None:
        both_P = (chosen.logratios < 0) & (rejected.logratios < 0) & counted_P
        statistics["logps/both_fell"] = Mean(both_P.float().sum(), num_pairs)
    if chosen.lengths is not None and rejected.lengths is not None:
        longer_P = (chosen.lengths - rejected.lengths).float() * counted_P
        right_P = (longer_P.sign() + 1) / 2 * counted_P
        statistics["length/accuracy"] = Mean(right_P.sum(), num_pairs)
        x_P = margin_P.float() * counted_P
        moments = torch.stack([x_P, longer_P, x_P.square(), longer_P.square(), x_P * longer_P])
        statistics["length/moments"] = Mean(moments.sum(1), num_pairs)
    statistics["rewards/histogram"] = Mean(margin_counts(margin_P, counted_P), num_pairs)
    return statistics


def length_correlation(moments: Tensor) -> Tensor:
    """Pearson's correlation of margins with differences of lengths; 0 where one does not vary.

    Args:
        moments: Means of margin, difference, both squared and their product, (5,).
    """
    x, y, xx, yy, xy = moments.double()
    variances = torch.stack([xx - x.square(), yy - y.square()])
    is_varied = (variances > _ROUNDING * torch.stack([xx, yy])).all()
    spread = variances.clamp(min=torch.finfo(torch.float64).tiny).prod().sqrt()
    return torch.where(is_varied, ((xy - x * y) / spread).clamp(-1, 1), 0.0).float()
