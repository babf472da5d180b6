"""The picture of a Curriculum: what batches were like, and what the loss was, over the run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_align.callbacks.metric_plot import COLOURS
from lightning_align.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 512
_LABELS = {
    "length": "tokens of a row",
    "batch_size": "samples of a batch",
    "difficulty": "difficulty at most",
    "eligible": "eligible share",
    "weights": "weights of corpora",
    "tokens": "tokens planned",
}


class LossCurve:
    """Losses by number of their batch, evenly spaced; some hundred, however long the run is.

    Attributes:
        points: Pairs of a number and a loss, ascending.
    """

    def __init__(self) -> None:
        self.points: list[list[float]] = []
        self._every = 1

    def wants(self, n: int) -> bool:
        """Whether the loss of batch n is one of them."""
        return n % self._every == 0

    def note(self, n: int, loss: float) -> None:
        """Take a loss down; what a run has gone back behind is forgotten."""
        while self.points and self.points[-1][0] >= n:
            self.points.pop()
        self.points.append([n, loss])
        if len(self.points) > MOST_POINTS:
            self._every *= 2
            self.points = [point for point in self.points if self.wants(int(point[0]))]

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"points": [list(point) for point in self.points], "every": self._every}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.points = [list(point) for point in state["points"]]
        self._every = state["every"]


def draw_run(rows: Sequence[Mapping[str, Any]], losses: Sequence[Sequence[float]]) -> "Figure":
    """A panel for the loss, and one for each property of batches that is known.

    Args:
        rows: What batches were, as ``Curriculum.preview`` tells it, ascending.
        losses: Pairs of a batch's number and its loss.
    """
    shown = [name for name in _LABELS if any(row.get(name) is not None for row in rows)]
    names = (["loss"] if losses else []) + shown
    figure = new_figure(7.0, 1.0 + 1.5 * len(names))
    axes: Any = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for name, each in zip(names, axes, strict=True):
        if name == "loss":
            each.plot(*zip(*losses, strict=True), color=COLOURS[1], linewidth=1.2)
            each.set_ylabel("loss")
        else:
            _draw_property(each, name, rows)
        each.spines[["top", "right"]].set_visible(False)
        each.grid(color="0.92")
    axes[-1].set_xlabel("batches")
    figure.align_ylabels(axes)
    return figure


def _draw_property(axes: "Axes", name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line, or one for each of several measures or corpora."""
    known = [row for row in rows if row.get(name) is not None]
    x = [row["batch"] for row in known]
    first = known[0][name]
    several = isinstance(first, Mapping)
    lines: Mapping[str, Any] = first if several else {name: first}
    for part, colour in zip(lines, COLOURS * len(lines), strict=False):
        y = [row[name][part] if several else row[name] for row in known]
        axes.step(x, y, where="post", color=colour, linewidth=1.6, label=part)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize="small")
    axes.set_ylabel(_LABELS[name], fontsize="small")
    axes.set_ylim(bottom=0)
