"""The order of samples under a curriculum: a pure function of the seed and the place.

A curriculum has *levels*, each with a *group* of samples that become eligible with it. What the
stream holds at any place is looked up, however late and whatever was asked before, and no order is
written down:

- a group is seen in passes of its own, each an order of its own (``keyed_permutation``), so that
  its samples have been seen equally often, or once more, at every moment;
- at each level the groups so far take turns in proportion to their sizes (``apportionment``): new
  ones join at once, and nobody is made up for what it was not shown;
- at the last level a round of as many places as there are eligible samples has each of them once.
  Where that level begins a group may be in the middle of a pass. To see each sample once in a round
  and none twice before another, it must begin every round with those that the pass had left. So
  from there on a group is two parts, each with an order of its own in every round.

Looking up costs the same for one place and for some thousand, so a *block* of them is looked up and
kept. A block never reaches over the end of a level; its places are shuffled, by rounds.

Shapes: N samples, G groups, P places of a block.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_align.data.apportionment import Apportionment
from lightning_align.data.eligibility import Levels
from lightning_align.data.keyed_permutation import keys, permuted
from lightning_align.seeds import derive_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Counts = NDArray[np.int64]
    Samples = NDArray[np.integer[Any]]

BLOCK = 1 << 13  # places that are looked up at once: their arrays fit in a core's cache


class CurriculumOrder:
    """An endless stream of samples in which harder ones join by and by (an ``Order``).

    Args:
        levels: The samples by groups.
        starts: Place of the stream at which each level begins, the first at 0.
        seed: Seed of every order.
        replacement: Draw every place from all eligible samples, whatever came before.

    Attributes:
        num_eligible: Samples that are eligible at each level, (G,).
    """

    def __init__(
        self, levels: Levels, starts: list[int], seed: int = 0, *, replacement: bool = False
    ) -> None:
        self.levels, self.starts, self.replacement = levels, starts, replacement
        self.num_eligible = np.cumsum(levels.sizes)
        self._first_G = self.num_eligible - levels.sizes  # where a group begins in levels.samples
        self._seed = derive_seed("curriculum", seed)
        self._apportionment = lru_cache(2)(self._apportion)
        self._seen = np.empty((0, 0), np.int64) if replacement else self._seen_at_starts()
        self._latest: tuple[int, Samples] = 0, np.empty(0, dtype=np.int64)

    def indices(self, first: int, last: int) -> list[int]:
        """Samples ``first`` to ``last`` (exclusive) of the stream."""
        found: list[int] = []
        while first < last:
            begin, block_P = self._latest
            if not begin <= first < begin + len(block_P):
                begin, places_P = self._block(first)
                block_P = self.levels.samples[places_P]
                self._latest = begin, block_P
            piece = block_P[first - begin : last - begin].tolist()
            found += piece
            first += len(piece)
        return found

    def seen(self, place: int) -> Counts:
        """How many samples of each group were drawn before a place, (G,); without replacement.

        Args:
            place: Place in the stream.
        """
        level = self.level(place)
        begin, places_P = self._block(place)
        counts: Counts = self._seen[level].copy()
        counts[: level + 1] += self._apportionment(level).counts(
            np.array([begin - self.starts[level]])
        )[0]
        # Inside of a block the groups take turns by chance.
        drawn_P = np.searchsorted(self.num_eligible, places_P[: place - begin], side="right")
        counts += np.bincount(drawn_P, minlength=len(counts))
        return counts

    def num_unseen(self, place: int) -> int:
        """How many samples, of those that become eligible at all, were never drawn before a place.

        Args:
            place: Place in the stream.
        """
        if self.replacement:  # no count says which came twice: they are drawn again
            drawn = np.zeros(len(self.levels.samples), dtype=bool)
            for first in range(0, place, BLOCK):
                drawn[self.indices(first, min(first + BLOCK, place))] = True
            return int(self.num_eligible[-1] - drawn.sum())
        return int(np.maximum(self.levels.sizes - self.seen(place), 0).sum())

    def level(self, place: int) -> int:
        """Number of the level that a place of the stream belongs to."""
        return bisect_right(self.starts, place) - 1

    def _block(self, place: int) -> tuple[int, Counts]:
        """The block a place is in: where it begins, and its places in ``levels.samples``, (P,)."""
        level = self.level(place)
        start, eligible = self.starts[level], int(self.num_eligible[level])
        # Of small rounds a block has several, and a large one has several blocks.
        span = max(1, BLOCK // eligible) * eligible
        number, within = divmod(place - start, span)
        first = number * span + within // BLOCK * BLOCK if eligible > BLOCK else number * span
        last = min(first + BLOCK, (number + 1) * span)
        if level + 1 < len(self.starts):
            last = min(last, self.starts[level + 1] - start)
        draw = self._with_replacement if self.replacement else self._without
        return start + first, draw(level, first, last)

    def _with_replacement(self, level: int, first: int, last: int) -> Counts:
        drawn_P = keys(self._seed, level, np.arange(first, last)) >> np.uint64(11)
        share = 2.0**-53 * float(self.num_eligible[level])
        places_P: Counts = (drawn_P * share).astype(np.int64)
        return places_P

    def _without(self, level: int, first: int, last: int) -> Counts:
        """Places in ``levels.samples`` of the samples ``first`` to ``last`` of a level, (P,)."""
        apportionment = self._apportionment(level)
        turn = int(apportionment.round)
        cuts = np.array([first, *range((first // turn + 1) * turn, last, turn), last])
        counts = apportionment.counts(cuts)
        shares = np.diff(counts, axis=0)  # of each round in the block, (rounds, G)
        groups_P = np.repeat(
            np.tile(np.arange(level + 1, dtype=np.uint16), len(shares)), shares.ravel()
        )
        if level > 0:
            groups_P = groups_P[self._shuffled(cuts, level)]
        by_group_P = np.argsort(groups_P, kind="stable")
        total_G = counts[-1] - counts[0]
        # A group's places in its own stream go on from `counts[0]`, in the order of the block.
        begins_G = counts[0] + self._seen[level][: level + 1] - (np.cumsum(total_G) - total_G)
        ranks_P = np.repeat(begins_G, total_G) + np.arange(last - first)
        found_P = np.empty(last - first, dtype=np.int64)
        found_P[by_group_P] = self._places(level, groups_P[by_group_P].astype(np.int64), ranks_P)
        return found_P

    def _shuffled(self, cuts: Counts, level: int) -> Counts:
        """A random order of the places between cuts, those of a round among themselves, (P,)."""
        # By keys as well: NumPy promises no generator's draws for its versions to come.
        sizes = np.diff(cuts)
        begins_P, sizes_P = np.repeat(cuts[:-1], sizes), np.repeat(sizes, sizes)
        places_P = np.arange(cuts[0], cuts[-1]) - begins_P
        places_P = permuted(places_P, sizes_P, keys(self._seed, level, begins_P, 0))
        places_P += begins_P - cuts[0]
        return places_P

    def _places(self, level: int, groups_P: Counts, ranks_P: Counts) -> Counts:
        """Places in ``levels.samples`` of what groups show at places of their own streams, (P,)."""
        sizes_P, first_P = self.levels.sizes[groups_P], self._first_G[groups_P]
        if level + 1 < len(self.starts):
            passes_P, places_P = np.divmod(ranks_P, sizes_P)
            return first_P + permuted(places_P, sizes_P, keys(self._seed, groups_P, passes_P))
        seen_P = self._seen[level][groups_P]
        passes_P, done_P = np.divmod(seen_P, sizes_P)
        rounds_P, places_P = np.divmod(ranks_P - seen_P, sizes_P)
        # The part that the pass had left comes first in every round, see above.
        left_P = sizes_P - done_P
        again_P = places_P >= left_P
        part_P = np.where(again_P, done_P, left_P)
        keys_P = keys(self._seed, groups_P, rounds_P, 1 + again_P)
        places_P = permuted(places_P - np.where(again_P, left_P, 0), part_P, keys_P)
        places_P += np.where(again_P, 0, done_P)
        return first_P + permuted(places_P, sizes_P, keys(self._seed, groups_P, passes_P))

    def _apportion(self, level: int) -> Apportionment:
        return Apportionment(self.levels.sizes[: level + 1])

    def _seen_at_starts(self) -> Counts:
        """How many samples of each group were drawn before each level, (G, G)."""
        sizes_G, num_levels = self.levels.sizes, len(self.starts)
        seen_GG = np.zeros((num_levels, num_levels), dtype=np.int64)
        lengths = np.diff(self.starts)
        for first in range(0, num_levels - 1, 64):  # some at once: 64 MB would be needed for all
            last = min(first + 64, num_levels - 1)
            sizes_LG = np.tril(np.broadcast_to(sizes_G[:last], (last - first, last)), first)
            counts_LG = Apportionment(sizes_LG).counts(lengths[first:last])
            seen_GG[first + 1 : last + 1, :last] = counts_LG
        return np.cumsum(seen_GG, axis=0, out=seen_GG)
