"""Figures of matplotlib, where it is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure that belongs to no window and no pyplot state.

    Args:
        width_in: Width in inches.
        height_in: Height in inches.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "Drawing needs matplotlib. Run: pip install lightning-align[plot]"
        raise ImportError(message) from error
    return Figure(figsize=(width_in, height_in), dpi=150, layout="constrained")
