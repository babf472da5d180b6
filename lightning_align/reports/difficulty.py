"""A difficulty index as a picture and in figures: where most samples are, and how many levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_align.data.difficulty import DifficultyIndex
from lightning_align.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BARS = 60
MOST = 0.9  # of the samples in one level is worth a word
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
SAMPLES, SHARE = "#56B4E9", "#D55E00"  # Okabe and Ito's palette


def draw_difficulty(indices: Sequence[DifficultyIndex]) -> Figure:
    """Histogram of the difficulties of each index, and the share of samples that are not harder.

    Args:
        indices: Of metrics, one below the other.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = new_figure(8, 3.2 * len(indices))
    every: Any = figure.subplots(len(indices), 1, squeeze=False)[:, 0]
    for index, axes in zip(indices, every, strict=True):
        counts = np.diff(index.offsets)
        heights, edges = np.histogram(index.levels.astype(float), BARS, weights=counts)
        axes.stairs(heights, edges, fill=True, color=SAMPLES)
        axes.set_xlabel(index.name.replace("_", " "))
        axes.set_ylabel("samples")
        share: Any = axes.twinx()
        share.plot(index.levels, np.cumsum(counts) / index.num_samples, color=SHARE)
        share.set_ylim(0, 1.02)
        share.set_ylabel("share that is not harder", color=SHARE)
        for each in (axes, share):
            each.spines["top"].set_visible(False)
    return figure


def describe_difficulty(index: DifficultyIndex) -> list[str]:
    """An index in lines: how many samples and levels, its percentiles, and if most are the same."""
    joined = " (finer difficulties are joined)" if index.joined else ""
    found = [f"{percent} %: {percentile(index, percent):.6g}" for percent in PERCENTILES]
    lines = [
        f"{index.name}: {index.num_samples:,} samples, {len(index.levels):,} levels{joined}",
        f"  {', '.join(found)}",
    ]
    share = float(np.diff(index.offsets).max()) / index.num_samples
    if share > MOST:
        lines.append(f"  {share:.1%} of the samples are equally difficult: no order is among them")
    return lines


def percentile(index: DifficultyIndex, percent: float) -> float:
    """The least difficulty that ``percent`` of the samples do not exceed."""
    place = max(0, math.ceil(index.num_samples * percent / 100) - 1)
    return float(index.levels[np.searchsorted(index.offsets[1:], place, side="right")])
