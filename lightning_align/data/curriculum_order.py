"""The order of samples under a curriculum: a pure function of the seed and the place.

A curriculum has *levels*, each with a *group* of samples that become eligible with it. What the
stream holds at any place is looked up, however late and whatever was asked before, and no order is
written down:

- a group is seen in passes of its own, each an order of its own (``keyed_permutation``), so that
  its samples have been seen equally often, or once more, at every moment;
- of each level's places the groups so far are allotted their shares by size, and take turns
  (``apportionment``): new ones join at once, and nobody is made up for what it was not shown;
- at the last level a round of as many places as there are eligible samples has each of them once.
  Where that level begins a group may be in the middle of a pass. To see each sample once in a round
  and none twice before another, it must begin every round with those that the pass had left. So
  from there on a group is two parts, each with an order of its own in every round.

Looking up costs the same for one place and for some thousand, so a *block* of them is looked up and
kept. A block never reaches over the end of a level; its places are shuffled, by rounds.

Shapes: N samples, G groups, L levels at once, P places of a block.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_align.data.apportionment import Apportionment, allotted, turns
from lightning_align.data.eligibility import Levels
from lightning_align.data.keyed_permutation import keys, permuted
from lightning_align.data.order import Blocks
from lightning_align.seeds import derive_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Counts = NDArray[np.int64]
    Samples = NDArray[np.integer[Any]]

BLOCK = 1 << 13  # places that are looked up at once: their arrays fit in a core's cache
TOGETHER = 32  # levels whose shares are computed at once


@dataclass(frozen=True)
class Level:
    """A level without replacement.

    Args:
        number: Its number, counted from 0.
        seen: How many samples of each group were drawn before it, (G,).
        allotted: How many of each group are drawn in it; None for the last one, which has no end.
        turns: How many of the first places in it each group gets.
    """

    number: int
    seen: Counts
    allotted: Counts | None
    turns: Apportionment


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
        self._seed = derive_seed("curriculum", seed)
        self._blocks = Blocks(self._samples_at)
        # How many of each group were drawn before levels 0, TOGETHER, 2 * TOGETHER and so on, as
        # far as was asked.
        self._seen = [np.zeros(len(starts), dtype=np.int64)]
        self._latest: Level | None = None

    def indices(self, first: int, last: int) -> list[int]:
        """Samples ``first`` to ``last`` (exclusive) of the stream."""
        return self._blocks.indices(first, last)

    def plan(self) -> list[int]:
        """What decides when groups join, as plain JSON."""
        return self.starts

    def seen(self, place: int) -> Counts:
        """How many samples of each group were drawn before a place, (G,); without replacement.

        Args:
            place: Place in the stream.
        """
        level = self._level(self.level(place))
        begin, places_P = self._block(place)
        into = np.array([begin - self.starts[level.number]])
        counts: Counts = level.seen + level.turns.counts(into)[0]
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

    def _samples_at(self, place: int) -> tuple[int, Samples]:
        begin, places_P = self._block(place)
        return begin, self.levels.samples[places_P]

    def _block(self, place: int) -> tuple[int, Counts]:
        """The block a place is in: where it begins, and its places in ``levels.samples``, (P,)."""
        level = self.level(place)
        start, eligible = self.starts[level], int(self.num_eligible[level])
        if level + 1 < len(self.starts):
            span = self.starts[level + 1] - start
        else:  # of small rounds a block has several, and a large one has several blocks
            span = max(1, BLOCK // eligible) * eligible
        number, within = divmod(place - start, span)
        first = number * span + within // BLOCK * BLOCK
        last = min(first + BLOCK, (number + 1) * span)
        draw = self._with_replacement if self.replacement else self._without
        return start + first, draw(level, first, last)

    def _with_replacement(self, level: int, first: int, last: int) -> Counts:
        drawn_P = keys(self._seed, level, np.arange(first, last)) >> np.uint64(11)
        share = 2.0**-53 * float(self.num_eligible[level])
        places_P: Counts = (drawn_P * share).astype(np.int64)
        return places_P

    def _without(self, number: int, first: int, last: int) -> Counts:
        """Places in ``levels.samples`` of the samples ``first`` to ``last`` of a level, (P,)."""
        level = self._level(number)
        turn = level.turns.round
        cuts = np.array([first, *range((first // turn + 1) * turn, last, turn), last])
        counts = level.turns.counts(cuts)
        shares = np.diff(counts, axis=0)  # of each round in the block, (rounds, G)
        groups = np.arange(len(self.starts), dtype=np.uint16)
        groups_P = np.repeat(np.tile(groups, len(shares)), shares.ravel())
        if number > 0:
            groups_P = groups_P[self._shuffled(cuts, number)]
        by_group_P = np.argsort(groups_P, kind="stable")
        total_G = counts[-1] - counts[0]
        # A group's places in its own stream go on from `counts[0]`, in the order of the block.
        begins_G = counts[0] + level.seen - (np.cumsum(total_G) - total_G)
        ranks_P = np.repeat(begins_G, total_G) + np.arange(last - first)
        found_P = np.empty(last - first, dtype=np.int64)
        seen_G = level.seen if level.allotted is None else None
        sorted_P = groups_P[by_group_P].astype(np.int64)
        found_P[by_group_P] = places_shown(self.levels, self._seed, sorted_P, ranks_P, seen_G)
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

    def _level(self, number: int) -> Level:
        """A level of which all is computed; the latest is kept."""
        latest = self._latest
        if latest is not None and latest.number == number:
            return latest
        if latest is not None and latest.number + 1 == number and latest.allotted is not None:
            seen = latest.seen + latest.allotted
        else:
            seen = self._seen_before(number)
        if number + 1 == len(self.starts):
            self._latest = Level(number, seen, None, Apportionment(self.levels.sizes))
        else:
            (row,) = self._allotted(number, number + 1)
            length = self.starts[number + 1] - self.starts[number]
            sizes = np.where(np.arange(len(row)) <= number, self.levels.sizes, 0)
            self._latest = Level(number, seen, row, turns(length, sizes, row))
        return self._latest

    def _seen_before(self, number: int) -> Counts:
        """How many samples of each group were drawn before a level, (G,)."""
        while len(self._seen) <= number // TOGETHER:
            first = (len(self._seen) - 1) * TOGETHER
            rows_LG = self._allotted(first, first + TOGETHER)
            self._seen.append(self._seen[-1] + rows_LG.sum(0))
        first = number // TOGETHER * TOGETHER
        counts: Counts = self._seen[number // TOGETHER] + self._allotted(first, number).sum(0)
        return counts

    def _allotted(self, first: int, last: int) -> Counts:
        """How many samples of each group levels ``first`` to ``last`` (exclusive) draw, (L, G)."""
        found_LG = np.zeros((last - first, len(self.starts)), dtype=np.int64)
        totals_L = self.num_eligible[first:last]
        lengths_L = np.diff(self.starts[first : last + 1])
        draws_L = (keys(self._seed, np.arange(first, last), 0, 3) >> np.uint64(1)).astype(np.int64)
        edges_LG = np.minimum(self.num_eligible[:last], totals_L[:, None])
        found_LG[:, :last] = allotted(lengths_L, edges_LG, draws_L % totals_L)
        return found_LG


def places_shown(
    levels: Levels, seed: int, groups_P: Counts, ranks_P: Counts, seen_G: Counts | None
) -> Counts:
    """Places in ``levels.samples`` of what groups show at places of their own streams, (P,).

    Args:
        levels: The samples by groups.
        seed: Seed of every order.
        groups_P: Groups.
        ranks_P: How many of a group's samples were drawn before.
        seen_G: How many of each group were drawn before all had joined, from where on each of their
            rounds has every sample once; None before that.
    """
    sizes_P = levels.sizes[groups_P]
    first_P = (np.cumsum(levels.sizes) - levels.sizes)[groups_P]
    if seen_G is None:
        passes_P, places_P = np.divmod(ranks_P, sizes_P)
        return first_P + permuted(places_P, sizes_P, keys(seed, groups_P, passes_P))
    passes_P, done_P = np.divmod(seen_G[groups_P], sizes_P)
    rounds_P, places_P = np.divmod(ranks_P - seen_G[groups_P], sizes_P)
    # A round begins with the part that the pass had left: none is seen twice before another.
    left_P = sizes_P - done_P
    again_P = places_P >= left_P
    part_P = np.where(again_P, done_P, left_P)
    keys_P = keys(seed, groups_P, rounds_P, 1 + again_P)
    places_P = permuted(places_P - np.where(again_P, left_P, 0), part_P, keys_P)
    places_P += np.where(again_P, 0, done_P)
    return first_P + permuted(places_P, sizes_P, keys(seed, groups_P, passes_P))
