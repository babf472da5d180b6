"""Who gets which of a row of places, in proportion to size and in whole numbers.

Two questions have an answer here. ``allotted``: how many of a stretch of places does each group
get? Each its exact share, rounded up or down by one draw for all. ``Apportionment``: how many of
its first x places, at every x, without a draw? There groups are the leaves of a binary tree. Of the
places that a node gets, its two children take turns in proportion to their sizes (Bresenham's
line); so how many of the first x places any group got follows from x alone, is never off by more
than the depth of the tree, and is exact after a round of as many places as all groups have.

Shapes: G groups; X numbers of places; ... one or more sets of sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Counts = NDArray[np.int64]

LONGEST = 1 << 31  # products of two numbers below it fit in 62 bits


class Apportionment:
    """Shares of groups of given sizes in the first places of a row.

    Args:
        sizes: Of each group, (G,), fewer than 2**31 in all.
    """

    def __init__(self, sizes: Counts) -> None:
        self.sizes = sizes
        leaves = 1 << (len(sizes) - 1).bit_length()
        self._nodes = [np.pad(sizes, (0, leaves - len(sizes)))]  # layer by layer, the root's first
        while len(self._nodes[0]) > 1:
            self._nodes.insert(0, self._nodes[0][::2] + self._nodes[0][1::2])
        self.round = int(self._nodes[0][0])

    def counts(self, places_X: Counts) -> Counts:
        """How many of the first x places each group got, (X, G)."""
        rounds_X, rest_X = np.divmod(places_X, self.round)
        counts = rest_X[:, None]
        for above, below in zip(self._nodes, self._nodes[1:], strict=False):
            left = counts * below[::2] // np.maximum(above, 1)  # below 2**62
            counts = np.stack([left, counts - left], axis=-1).reshape(len(places_X), -1)
        return counts[:, : len(self.sizes)] + rounds_X[:, None] * self.sizes


def allotted(lengths_X: Counts, edges_XG: Counts, draws_X: Counts) -> Counts:
    """How many places of each stretch each group gets: its share, rounded up or down, (X, G).

    Systematic sampling (Madow and Madow 1944, doi:10.1214/aoms/1177731312): over all draws the
    mean is the share itself, so that over many short stretches nobody gains by being rounded.

    Args:
        lengths_X: Places of each stretch.
        edges_XG: Sizes of the groups, summed up, at each stretch; fewer than 2**31 in all.
        draws_X: A number for each stretch, from 0 to below the sum of its sizes.
    """
    totals_X1 = edges_XG[:, -1:]
    rounds_X1, rest_X1 = np.divmod(lengths_X[:, None], totals_X1)
    reached_XG = rest_X1 * edges_XG
    reached_XG += draws_X[:, None]
    reached_XG //= totals_X1
    reached_XG += rounds_X1 * edges_XG
    found_XG = np.diff(reached_XG, axis=1, prepend=0)
    for number in np.flatnonzero(lengths_X >= LONGEST):  # then `turns` cannot end with any count
        sizes = np.diff(edges_XG[number], prepend=0)
        found_XG[number] = Apportionment(sizes).counts(lengths_X[number : number + 1])[0]
    return found_XG


def turns(length: int, sizes: Counts, allotted: Counts) -> Apportionment:
    """How groups take turns in a stretch, so that each has at its end what it is allotted."""
    return Apportionment(allotted if length < LONGEST else sizes)
