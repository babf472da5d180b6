"""The picture of LISA."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lightning_align.callbacks.lisa_picture import draw_history


def bars_of(figure: Any) -> list[tuple[int, int, int]]:
    """(row, first step, end) of each."""
    (axes,) = figure.axes
    boxes = [path.get_extents() for bars in axes.collections for path in bars.get_paths()]
    return sorted((round(np.mean([b.y0, b.y1])), round(b.x0), round(b.x1)) for b in boxes)


def labels_of(figure: Any) -> list[str]:
    return [tick.get_text() for tick in figure.axes[0].get_yticklabels()]


def test_it_shows_which_blocks_trained_when() -> None:
    figure = draw_history([(0, (0, 2)), (5, (1, 2))], 3, 8, ["head", "embedding"])
    assert bars_of(figure) == [(-1, 0, 8), (0, 0, 5), (1, 5, 8), (2, 0, 5), (2, 5, 8), (3, 0, 8)]
    assert labels_of(figure) == ["0", "1", "2", "head", "embedding"]
    low, high = figure.axes[0].get_ylim()
    assert low < -1.4
    assert high > 3.4


def test_a_run_that_joined_late_begins_there() -> None:
    figure = draw_history([(5, (1,))], 2, 9, ["head"])
    assert bars_of(figure) == [(1, 5, 9), (2, 5, 9)]


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (1, ["0"]),
        (16, [str(block) for block in range(16)]),
        (32, [str(block) for block in range(0, 32, 2)]),
        (100, [str(block) for block in range(0, 100, 6)]),
    ],
)
def test_rows_of_a_deep_model_are_labelled_at_intervals(
    blocks: int, expected: Sequence[str]
) -> None:
    assert labels_of(draw_history([(0, (0,))], blocks, 1)) == expected


def test_it_grows_with_the_blocks_and_still_fits_a_page() -> None:
    heights = [draw_history([(0, (0,))], n, 1).get_size_inches()[1] for n in (4, 12, 200)]
    assert heights[0] < heights[1] < heights[2] == 9
