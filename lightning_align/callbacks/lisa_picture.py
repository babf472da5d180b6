"""The picture of LISA: which blocks trained when."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_align.callbacks.metric_plot import COLOURS
from lightning_align.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_history(
    history: Sequence[tuple[int, Sequence[int]]],
    num_blocks: int,
    end_step: int,
    always: Sequence[str] = (),
) -> "Figure":
    """A row for each block, the first at the bottom, with a bar over the steps that it trained.

    Args:
        history: (first step, blocks) of each draw.
        num_blocks: Number of rows.
        end_step: Where the last draw ends.
        always: Names of what trained all the time, drawn above (head) and below (embedding).
    """
    figure = new_figure(7.0, min(9.0, 1.2 + 0.2 * (num_blocks + len(always))))
    axes = figure.add_subplot()
    ends = [step for step, _ in history[1:]] + [end_step]
    spans: dict[int, list[tuple[int, int]]] = {}
    for (start, blocks), end in zip(history, ends, strict=True):
        for block in blocks:
            spans.setdefault(block, []).append((start, end - start))
    for block, bars in spans.items():
        axes.broken_barh(bars, (block - 0.4, 0.8), color=COLOURS[0])
    rows = {"embedding": -1, "head": num_blocks}
    for name in always:
        whole = (history[0][0], end_step - history[0][0])
        axes.broken_barh([whole], (rows[name] - 0.4, 0.8), color="0.75")
    stride = max(1, num_blocks // 16)
    ticks = {block: str(block) for block in range(0, num_blocks, stride)}
    ticks |= {rows[name]: name for name in always}
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(-1.6, num_blocks + 0.6)
    axes.set(xlabel="optimizer steps", ylabel="block")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
