"""Sums over pairs: worked numbers, merging, and what must not be counted."""

import math

import numpy as np
import pytest
import torch

from lightning_align.losses import (
    MARGIN_BINS,
    length_correlation,
    margin_counts,
    margin_edges,
    pair_statistics,
    with_margins,
)
from lightning_align.losses.scores import CompletionScores, PairScores

ALL = torch.ones(4, dtype=torch.bool)


def scores(chosen, rejected, lengths=((1, 1, 1, 1), (1, 1, 1, 1)), reference=True):
    zeros = torch.zeros(len(chosen)) if reference else None
    sides = [
        CompletionScores(torch.tensor(logratios), zeros, torch.tensor(counts))
        for logratios, counts in zip((chosen, rejected), lengths, strict=True)
    ]
    return PairScores(*sides)


def means(statistics):
    return {name: mean.value for name, mean in statistics.items()}


def test_both_fell_where_both_log_ratios_are_below_zero():
    """Of four pairs: both, the chosen alone, neither, and one that stayed where it was."""
    ours = scores([-1.0, -1.0, 2.0, 0.0], [-3.0, 1.0, 1.0, -1.0])
    assert means(pair_statistics(ours, ours.margin, ALL))["logps/both_fell"] == 0.25
    counted = torch.tensor([True, False, False, False])
    assert means(pair_statistics(ours, ours.margin, counted))["logps/both_fell"] == 1
    assert "logps/both_fell" not in pair_statistics(
        scores([-1.0] * 4, [-1.0] * 4, reference=False), ours.margin, ALL
    )


def test_the_longer_one_is_right_where_the_chosen_is_and_half_right_of_equals():
    """Longer, shorter, equal, longer: (1 + 0 + 1/2 + 1) / 4."""
    ours = scores([0.0] * 4, [0.0] * 4, ((5, 1, 3, 9), (2, 4, 3, 8)))
    assert means(pair_statistics(ours, ours.margin, ALL))["length/accuracy"] == 2.5 / 4
    counted = torch.tensor([True, True, False, False])  # an equal one that fills a batch up
    assert means(pair_statistics(ours, ours.margin, counted))["length/accuracy"] == 0.5


def test_correlation_matches_numpy_and_merges_over_unequal_batches():
    generator = np.random.default_rng(0)
    chosen, rejected = generator.integers(1, 400, (2, 60))
    margin = generator.normal(0.5, 3.0, 60) + 0.01 * (chosen - rejected)
    theirs = np.corrcoef(margin, chosen - rejected)[0, 1]
    assert 0.2 < theirs < 0.7
    totals, count = torch.zeros(5), 0
    for part in (slice(0, 7), slice(7, 40), slice(40, 60)):
        zeros = torch.zeros(len(margin[part]))
        pair = PairScores(
            CompletionScores(zeros, zeros, torch.tensor(chosen[part])),
            CompletionScores(zeros, zeros, torch.tensor(rejected[part])),
        )
        margin_P = torch.tensor(margin[part], dtype=torch.float32)
        found = pair_statistics(pair, margin_P, torch.ones_like(zeros, dtype=torch.bool))
        totals = totals + found["length/moments"].total
        count += found["length/moments"].count
    # fp32 sums of 60 squares near 1e5, of which the variance is most
    torch.testing.assert_close(
        length_correlation(totals / count).double(), torch.tensor(theirs), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("margin", "longer", "expected"),
    [
        ([1.0, 2.0, 3.0], [10, 20, 30], 1.0),
        ([3.0, 2.0, 1.0], [10, 20, 30], -1.0),
        ([2.0, 2.0, 2.0], [10, 20, 30], 0.0),  # no margin varies
        ([1.0, 2.0, 3.0], [7, 7, 7], 0.0),
        ([0.0, 0.0, 0.0], [0, 0, 0], 0.0),
        ([1.0], [5], 0.0),
    ],
)
def test_correlations_at_the_ends(margin, longer, expected):
    x, y = torch.tensor(margin), torch.tensor(longer, dtype=torch.float32)
    moments = torch.stack([x.mean(), y.mean(), (x * x).mean(), (y * y).mean(), (x * y).mean()])
    assert length_correlation(moments).item() == pytest.approx(expected, abs=1e-6)


def test_edges_are_symmetric_grow_and_have_zero():
    edges = margin_edges()
    assert len(edges) == MARGIN_BINS + 1
    assert edges[MARGIN_BINS // 2] == 0
    torch.testing.assert_close(edges, -edges.flip(0))
    assert (edges.diff() > 0).all()
    assert edges[-1].item() == pytest.approx(1000)


def test_each_margin_is_counted_between_its_edges():
    """Over seven powers of ten, either sign; beyond the ends in the outermost bins."""
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(500, generator=generator) * 10 ** (
        5 * torch.rand(500, generator=generator) - 2
    )
    margins = torch.cat([margins, torch.tensor([0.0, 1e6, -1e6, math.inf, -math.inf])])
    counts = margin_counts(margins, torch.ones(505, dtype=torch.bool))
    theirs, _ = np.histogram(margins.clamp(-999, 999).numpy(), bins=margin_edges().numpy())
    # a margin within rounding of an edge may fall on its other side
    assert np.abs(counts.numpy() - theirs).sum() <= 2
    assert counts.sum() == 505
    assert counts[MARGIN_BINS // 2 :].sum() == (margins >= 0).sum()


def test_pairs_that_do_not_count_or_are_no_number_are_in_no_bin():
    margins = torch.tensor([1.0, math.nan, -1.0, 0.0])
    counted = torch.tensor([True, True, True, False])
    assert margin_counts(margins, counted).sum() == 2


def test_means_that_are_logged_are_numbers():
    ours = scores([1.0, 2.0, 3.0, 4.0], [0.0] * 4, ((1, 2, 3, 4), (1, 1, 1, 1)))
    given = means(pair_statistics(ours, ours.margin, ALL))
    logged = with_margins(
        {"rewards/chosen": torch.tensor(2.0), "rewards/rejected": torch.tensor(0.5), **given}
    )
    assert logged["length/correlation"] == pytest.approx(1.0)
    assert logged["rewards/margins"] == 1.5
    assert all(value.ndim == 0 for value in logged.values())


def test_pairs_are_counted_in_a_run_in_bf16():
    """Where Lightning makes bf16 the type of what is made; 257 is no number of bf16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        counts = margin_counts(torch.ones(257), torch.ones(257, dtype=torch.bool))
    finally:
        torch.set_default_dtype(torch.float32)
    assert counts.dtype == torch.float32
    assert counts.max() == 257
