"""The picture of a preference run: margins of its pairs over time, and the KL beside them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_align.callbacks.metric_plot import COLOURS
from lightning_align.figure import new_figure
from lightning_align.losses import MARGIN_BINS, KLEstimate, margin_edges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass
class MarginHistory:
    """Histograms of margins, each of the pairs since the one before it.

    Attributes:
        steps: Optimizer step at which each ends.
        counts: Pairs in each bin of ``margin_edges``, one tensor (M,) a histogram.
    """

    steps: list[int] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)

    def add(self, step: int, counts: Tensor) -> None:
        """Another histogram, unless it is of no pair."""
        counts = counts.detach().cpu().round().long()
        if counts.any():
            self.steps.append(step)
            self.counts.append(counts)

    def state_dict(self) -> dict[str, Any]:
        """As plain data."""
        empty = torch.zeros(0, MARGIN_BINS, dtype=torch.long)
        return {"steps": [*self.steps], "counts": torch.stack(self.counts) if self.steps else empty}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "MarginHistory":
        """From ``state_dict``."""
        return cls([*state["steps"]], list(state["counts"].unbind()))


def quantile(counts: Tensor, share: float) -> float:
    """Margin below which a share of the pairs lies, evenly spread within its bin.

    Args:
        counts: Pairs in each bin of ``margin_edges``, (M,).
        share: In (0, 1).
    """
    edges, below = margin_edges(), counts.cumsum(0)
    wanted = share * float(below[-1])
    place = int((below < wanted).sum())
    part = (wanted - float(below[place] - counts[place])) / float(counts[place])
    return float(edges[place] + part * (edges[place + 1] - edges[place]))


def draw_diagnostics(
    margins: Mapping[str, MarginHistory], kl: Sequence[tuple[int, KLEstimate]]
) -> "Figure":
    """A panel for each stage that has histograms, and one for the KL if there is any.

    Args:
        margins: Histograms by title.
        kl: Estimates and the step of each.
    """
    drawn = {title: history for title, history in margins.items() if history.steps}
    num_panels = len(drawn) + bool(kl)
    figure = new_figure(7.0, 0.4 + 2.4 * num_panels)
    end = max([*(history.steps[-1] for history in drawn.values()), *(step for step, _ in kl)])
    bins = torch.stack([counts for h in drawn.values() for counts in h.counts] or [torch.zeros(1)])
    for number, (title, history) in enumerate(drawn.items(), start=1):
        axes = figure.add_subplot(num_panels, 1, number)
        _draw_margins(axes, history, bins.sum(0))
        axes.set_title(title, fontsize="medium", loc="left")
        axes.set_xlim(0, end)
    if kl:
        axes = figure.add_subplot(num_panels, 1, num_panels)
        _draw_kl(axes, kl)
        axes.set_xlim(0, 1.02 * end)
    axes.set_xlabel("optimizer steps")
    return figure


def _draw_margins(axes: "Axes", history: MarginHistory, all_counts: Tensor) -> None:
    edges, steps = margin_edges(), [0, *history.steps]
    occupied = all_counts.nonzero()
    low, high = max(0, int(occupied.min()) - 1), min(MARGIN_BINS, int(occupied.max()) + 2)
    counts = torch.stack(history.counts).double()
    shares = counts / counts.sum(1, keepdim=True)
    mesh = axes.pcolormesh(
        steps, edges[low : high + 1], shares[:, low:high].T, cmap="Blues", vmin=0, rasterized=True
    )
    # Three lines: half of all pairs have margins between the outer ones.
    middles = [(start + end) / 2 for start, end in zip(steps, history.steps, strict=False)]
    for share, width in ((0.25, 0.9), (0.5, 1.8), (0.75, 0.9)):
        values = [quantile(each, share) for each in history.counts]
        label = "median" if share == 0.5 else "quartiles" if share == 0.25 else None
        axes.plot(middles, values, color=COLOURS[1], linewidth=width, label=label)
    axes.axhline(0, color="0.35", linewidth=0.8, linestyle="--")
    axes.set_yscale("asinh", linear_width=0.5)
    ends = float(edges[low]), float(edges[high])
    axes.set_ylim(*ends)
    if len(ticks := margin_ticks(*ends)) > 1:
        axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.set_ylabel("margin of rewards")
    axes.legend(frameon=False, fontsize="small", loc="upper left")
    axes.figure.colorbar(mesh, ax=axes, label="share of pairs", pad=0.01)


def margin_ticks(low: float, high: float) -> list[float]:
    """0 and powers of ten, without those that would stand on it."""
    furthest = max(-low, high)
    last = math.floor(math.log10(furthest))
    sizes = [10.0**power for power in range(min(0, last), last + 1)]
    return [tick for tick in (*(-size for size in sizes[::-1]), 0.0, *sizes) if low <= tick <= high]


def _draw_kl(axes: "Axes", kl: Sequence[tuple[int, KLEstimate]]) -> None:
    steps = [step for step, _ in kl]
    values = [each.kl for _, each in kl]
    errors = [each.standard_error for _, each in kl]
    axes.errorbar(
        steps, values, yerr=errors, color=COLOURS[0], marker="o", ms=3.5, linewidth=1.6, capsize=2
    )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("KL to the reference\n(nats per sample, ± 1 s.e.)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
