"""The picture: histories as plain data, quantiles of counts, and what is drawn."""

import numpy as np
import pytest
import torch

from lightning_align.callbacks.preference_picture import (
    MarginHistory,
    draw_diagnostics,
    margin_ticks,
    quantile,
)
from lightning_align.losses import MARGIN_BINS, KLEstimate, margin_counts, margin_edges


def counts(margins):
    margins = torch.as_tensor(margins, dtype=torch.float32)
    return margin_counts(margins, torch.ones_like(margins, dtype=torch.bool))


def history(*centres):
    generator = torch.Generator().manual_seed(0)
    made = MarginHistory()
    for number, centre in enumerate(centres, start=1):
        made.add(10 * number, counts(torch.randn(64, generator=generator) + centre))
    return made


def kl(value, error=0.1):
    return KLEstimate(value, error, value, 2 * error, value / 8, 64)


def test_a_history_is_plain_data_and_leaves_histograms_of_nothing_out():
    made = history(0.0, 1.0)
    made.add(30, torch.zeros(MARGIN_BINS))
    again = MarginHistory.from_state(made.state_dict())
    assert again.steps == made.steps == [10, 20]
    assert all(map(torch.equal, again.counts, made.counts))
    assert made.state_dict()["counts"].shape == (2, MARGIN_BINS)
    empty = MarginHistory.from_state(MarginHistory().state_dict())
    assert (empty.steps, empty.counts) == ([], [])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_quantiles_lie_in_the_bin_of_the_exact_ones(share):
    margins = np.random.default_rng(0).normal(2.0, 5.0, 4001)
    exact = np.quantile(margins, share)
    edges = margin_edges().numpy()
    width = np.diff(edges)[np.searchsorted(edges, exact) - 1]
    assert abs(quantile(counts(margins), share) - exact) < width


def test_panels_are_of_what_there_is():
    histories = {"training pairs": history(0.0, 1.0, 3.0), "held-out pairs": history(0.5)}
    figure = draw_diagnostics(histories, [(10, kl(0.5)), (30, kl(2.0))])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["training pairs", "", "held-out pairs", "", ""]  # with colour bars
    last = figure.axes[-1]
    assert last.get_ylabel().startswith("KL to the reference")
    # of three histograms the medians rise as their centres do
    middle = next(line for line in figure.axes[0].lines if line.get_label() == "median")
    assert middle.get_ydata() == pytest.approx([0.0, 1.0, 3.0], abs=0.5)
    assert list(middle.get_xdata()) == [5, 15, 25]
    alone = draw_diagnostics(
        {"training pairs": history(0.0), "held-out pairs": MarginHistory()}, []
    )
    assert len(alone.axes) == 2
    assert len(draw_diagnostics({"training pairs": MarginHistory()}, [(5, kl(1.0))]).axes) == 1


def test_the_colour_is_the_share_of_pairs():
    figure = draw_diagnostics({"training pairs": history(0.0, 4.0)}, [])
    drawn = np.asarray(figure.axes[0].collections[0].get_array())
    np.testing.assert_allclose(drawn.sum(axis=0), 1.0)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (-3.0, 3.0, [-1, 0, 1]),
        (-2.0, 30.0, [-1, 0, 1, 10]),
        (-0.3, 0.05, [-0.1, 0]),
        (2.0, 300.0, [10, 100]),
        (28.0, 33.0, []),
    ],
)
def test_numbers_beside_margins_are_those_that_do_not_stand_on_zero(low, high, ticks):
    assert margin_ticks(low, high) == ticks


def test_numbers_beside_margins_are_plain():
    axes = draw_diagnostics({"training pairs": history(0.0)}, []).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["-1", "0", "1"]
