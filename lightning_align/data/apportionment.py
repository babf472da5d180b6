"""Who gets which of a row of places, in proportion to size at every moment and without a draw.

Groups are the leaves of a binary tree. Of the places that a node gets, its two children take turns
in proportion to their sizes (Bresenham's line); so how many of the first x places any group got
follows from x alone, is never off by more than the depth of the tree, and is exact after a round of
as many places as all groups have samples.

Shapes: G groups; X numbers of places; ... one or more sets of sizes.
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
        sizes: Samples of each group, (G,), fewer than 2**31 in all; or several such sets, (X, G),
            one for each number of places that is asked for.
    """

    def __init__(self, sizes: Counts) -> None:
        self.sizes = sizes
        self.num_groups = sizes.shape[-1]
        leaves = 1 << (self.num_groups - 1).bit_length()
        padded = np.zeros((*sizes.shape[:-1], leaves), dtype=np.int64)
        padded[..., : self.num_groups] = sizes
        self._nodes = [padded]  # sizes of the nodes, layer by layer, the root's first
        while self._nodes[0].shape[-1] > 1:
            self._nodes.insert(0, self._nodes[0][..., ::2] + self._nodes[0][..., 1::2])
        self.round = self._nodes[0][..., 0]

    def counts(self, places_X: Counts) -> Counts:
        """How many of the first x places each group got, (X, G)."""
        rounds_X, rest_X = np.divmod(places_X, self.round)
        counts = rest_X[:, None]
        for above, below in zip(self._nodes, self._nodes[1:], strict=False):
            left = counts * below[..., ::2] // np.maximum(above, 1)  # below 2**62
            counts = np.stack([left, counts - left], axis=-1).reshape(len(places_X), -1)
        return counts[:, : self.num_groups] + rounds_X[:, None] * self.sizes
