"""Who gets which of a row of places, in proportion to size at every moment and without a draw.

Groups are the leaves of a binary tree. Of the places that a node gets, its two children take turns
in proportion to their sizes (Bresenham's line); so how many of the first x places any group got
follows from x alone, is never off by more than the depth of the tree, and is exact after a round of
as many places as all groups have samples.

Shapes: G groups, a power of two; X numbers of places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Counts = NDArray[np.int64]


class Apportionment:
    """Shares of groups of given sizes.

    Args:
        sizes_G: Samples of each group, fewer than 2**31 in all; any number of groups.
    """

    def __init__(self, sizes_G: Counts) -> None:
        self.num_groups = len(sizes_G)
        padded = np.zeros(1 << (self.num_groups - 1).bit_length(), dtype=np.int64)
        padded[: self.num_groups] = sizes_G
        self._nodes = [padded]  # sizes of the nodes, layer by layer, the root's first
        while len(self._nodes[0]) > 1:
            self._nodes.insert(0, self._nodes[0].reshape(-1, 2).sum(1))
        self.sizes = padded[: self.num_groups]
        self.round = int(self._nodes[0][0])

    def counts(self, places_X: Counts) -> Counts:
        """How many of the first x places each group got, (X, G)."""
        rounds_X, rest_X = np.divmod(places_X, self.round)
        counts = rest_X[:, None]
        for above, below in zip(self._nodes, self._nodes[1:], strict=False):
            left = counts * below[::2] // np.maximum(above, 1)  # below 2**62
            counts = np.stack([left, counts - left], axis=-1).reshape(len(places_X), -1)
        return counts[:, : self.num_groups] + rounds_X[:, None] * self.sizes
