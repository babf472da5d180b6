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


class Passes:
    """Passes of N samples one after the other, each drawn as a whole; the latest is kept.

    Args:
        num_samples: Number N of samples in a pass.
        draw: The samples of a pass, (N,), a pure function of its number.
    """

    def __init__(self, num_samples: int, draw: Callable[[int], NDArray[np.integer]]) -> None:
        self.num_samples = num_samples
        self.draw = draw
        self._latest: tuple[int, NDArray[np.integer]] | None = None

    def indices(self, first: int, last: int) -> list[int]:
        """Samples ``first`` to ``last`` (exclusive) of the stream."""
        found: list[int] = []
        while first < last:
            number, begin = divmod(first, self.num_samples)
            if self._latest is None or self._latest[0] != number:
                self._latest = number, self.draw(number)
            end = min(begin + last - first, self.num_samples)
            found += self._latest[1][begin:end].tolist()
            first += end - begin
        return found


def shuffled(num_samples: int, seed: int) -> Passes:
    """Every sample once in each pass, in an order drawn from the seed and the pass."""
    return Passes(num_samples, partial(draw_order, num_samples, seed))


def mixed(mixture: Mixture, seed: int) -> Passes:
    """Samples of corpora by their weights, in an order drawn from the seed and the pass."""
    return Passes(sum(mixture.sizes), partial(_mixed_pass, mixture, seed))


def _mixed_pass(mixture: Mixture, seed: int, number: int) -> NDArray[np.integer]:
    return mixture.samples(seed, number)[draw_order(sum(mixture.sizes), seed, number)]
