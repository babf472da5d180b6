"""The order of samples: which of them is where in an endless stream, of which batches are cut.

A stream knows no batches, ranks or epochs. ``PositionSampler`` asks its ``order`` for a stretch of
it and divides what it gets, so that another order is another object with ``indices``, and nothing
else changes.

Shapes: N samples in a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from lightning_align.data.mixture import Mixture, draw_order

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Samples = NDArray[np.integer]


class Order(Protocol):
    """An endless stream of samples, of which any stretch can be looked up."""

    def indices(self, first: int, last: int) -> list[int]:
        """Samples ``first`` to ``last`` (exclusive) of the stream: the same at every call."""
        ...


class Sequential:
    """The samples as they lie, again and again.

    Args:
        num_samples: Number N of samples.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def indices(self, first: int, last: int) -> list[int]:
        """Samples ``first`` to ``last`` (exclusive) of the stream."""
        return [place % self.num_samples for place in range(first, last)]


class Blocks:
    """A stream that is made in blocks, each as a whole; the latest is kept.

    Args:
        look_up: Called with a place; returns where the block that it is in begins, and its samples.
    """

    def __init__(self, look_up: Callable[[int], tuple[int, Samples]]) -> None:
        self.look_up = look_up
        self._latest: tuple[int, Samples | None] = 0, None

    def indices(self, first: int, last: int) -> list[int]:
        """Samples ``first`` to ``last`` (exclusive) of the stream."""
        found: list[int] = []
        while first < last:
            begin, block = self._latest
            if block is None or not begin <= first < begin + len(block):
                begin, block = self._latest = self.look_up(first)
            piece = block[first - begin : last - begin].tolist()
            found += piece
            first += len(piece)
        return found


def shuffled(num_samples: int, seed: int) -> Blocks:
    """Every sample once in each pass, in an order drawn from the seed and the pass."""
    return _passes(num_samples, partial(draw_order, num_samples, seed))


def mixed(mixture: Mixture, seed: int) -> Blocks:
    """Samples of corpora by their weights, in an order drawn from the seed and the pass."""
    return _passes(sum(mixture.sizes), partial(_mixed_pass, mixture, seed))


def _passes(num_samples: int, draw: Callable[[int], Samples]) -> Blocks:
    """Passes of N samples one after the other, each drawn from its number."""
    return Blocks(partial(_pass_at, num_samples, draw))


def _pass_at(num_samples: int, draw: Callable[[int], Samples], place: int) -> tuple[int, Samples]:
    number = place // num_samples
    return number * num_samples, draw(number)


def _mixed_pass(mixture: Mixture, seed: int, number: int) -> Samples:
    return mixture.samples(seed, number)[draw_order(sum(mixture.sizes), seed, number)]
