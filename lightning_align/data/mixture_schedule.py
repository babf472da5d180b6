"""A mixture of corpora whose weights change with time, with exact counts at every place.

Weights come in *phases*, which begin at batches. Of the places of a phase each corpus is allotted
its share, rounded up or down, and they take turns (``apportionment``): how many samples of each
corpus come before any place is looked up, and is never off by more than a few from what the weights
say. Each corpus is its own endless stream of passes in random order (``keyed_permutation``), which
goes on from phase to phase: whatever the weights, each of its samples comes once before one comes
again.

Shapes: C corpora; F phases; P places of a block; X places.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_align._errors import argument_error, check_whole, finite_number
from lightning_align.data.apportionment import Apportionment, allotted, turns
from lightning_align.data.keyed_permutation import keys, permuted
from lightning_align.data.mixture import largest_remainder
from lightning_align.data.order import Blocks
from lightning_align.seeds import derive_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Counts = NDArray[np.int64]

WHERE = "MixtureSchedule"
PARTS = 1 << 20  # weights are whole numbers of so many parts
PIECES = 100  # in so many phases at most weights go from those of one step to the next
BLOCK = 1 << 10


class MixtureSchedule:
    """Corpora that lie one behind the other, and the weight of each at every batch.

    Args:
        sizes: Number of samples of each corpus.
        weights: For each step, the weight of each corpus; only their ratios matter. A weight of 0
            leaves a corpus out.
        steps: The batch, counted from 0, from which on each of the weights hold; the first is 0.
        interpolate: Weights go from those of one step to those of the next, in a hundred changes
            or one each batch; behind the last step they stay.

    Attributes:
        phases: Pairs of a batch and the parts in ``PARTS`` that each corpus has from it on, where
            they change.

    Raises:
        ValueError: If there are other weights than corpora or other steps than weights, the steps
            do not rise from 0, or a weight is negative, not finite or so small that it has no part.

    Example:
        >>> schedule = MixtureSchedule([100, 100], [[3, 1], [1, 3]], [0, 10], interpolate=True)
        >>> schedule.weights_at(0), schedule.weights_at(5), schedule.weights_at(10)
        ([0.75, 0.25], [0.5, 0.5], [0.25, 0.75])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[Sequence[float]],
        steps: Sequence[int],
        interpolate: bool = False,
    ) -> None:
        check_whole(WHERE, **{f"steps[{i}]": step for i, step in enumerate(steps)})
        if len(steps) != len(weights) or not steps:
            rule = f"must be as many as there are weights, {len(weights)}, and at least one"
            raise argument_error(WHERE, "steps", list(steps), rule)
        if steps[0] != 0 or sorted({*steps}) != [*steps]:
            raise argument_error(WHERE, "steps", list(steps), "must begin at 0 and rise")
        if min(sizes, default=0) < 1 or max(sizes) >= 1 << 31:
            rule = "must be from 1 to below 2**31, and at least one"
            raise argument_error(WHERE, "sizes", list(sizes), rule)
        self.sizes, self.steps, self.interpolate = list(sizes), list(steps), interpolate
        shares = [_parts(len(sizes), row) for row in weights]
        self.phases = [(0, shares[0])]
        for number in range(1, len(steps)):
            ends = [(steps[end], shares[end]) for end in (number - 1, number)]
            for step, parts in _between(*ends) if interpolate else ends[1:]:
                if parts != self.phases[-1][1]:
                    self.phases.append((step, parts))

    def weights_at(self, n: int) -> list[float]:
        """The share of each corpus in batch ``n``."""
        number = bisect_right(self.phases, n, key=lambda phase: phase[0]) - 1
        return [part / PARTS for part in self.phases[number][1]]

    def order(self, seed: int, before: Callable[[int], int]) -> MixtureOrder:
        """The stream of samples.

        Args:
            seed: Seed of every order.
            before: How many samples of the stream come before a batch.
        """
        return MixtureOrder(self, [before(n) for n, _ in self.phases], seed)

    def plain(self) -> dict[str, Any]:
        """What decides which samples come, as plain data."""
        return {"sizes": self.sizes, "phases": [[n, *parts] for n, parts in self.phases]}


class MixtureOrder:
    """An endless stream of samples of corpora (an ``Order``).

    Args:
        schedule: The corpora and their weights.
        starts: Place of the stream at which each phase begins, the first at 0.
        seed: Seed of every order.
    """

    def __init__(self, schedule: MixtureSchedule, starts: Sequence[int], seed: int) -> None:
        self.schedule, self.starts = schedule, list(starts)
        self._seed = derive_seed("mixture", seed)
        self._parts_FC = np.array([parts for _, parts in schedule.phases])
        self._lengths = [*np.diff(self.starts).tolist(), None]
        draws_F = (keys(self._seed, np.arange(len(starts) - 1)) >> np.uint64(44)).astype(np.int64)
        edges_FC = np.cumsum(self._parts_FC[:-1], axis=1)
        self._allotted_FC = allotted(np.diff(self.starts), edges_FC, draws_F)
        self._seen_FC = np.cumsum([np.zeros_like(self._parts_FC[0]), *self._allotted_FC], axis=0)
        self._sizes_C = np.array(schedule.sizes)
        self._first_C = np.cumsum(self._sizes_C) - self._sizes_C
        self._blocks = Blocks(self._block)
        self._latest: tuple[int, Apportionment | None] = -1, None

    def indices(self, first: int, last: int) -> list[int]:
        """Samples ``first`` to ``last`` (exclusive) of the stream."""
        return self._blocks.indices(first, last)

    def counts(self, place: int) -> list[int]:
        """How many samples of each corpus come before a place of the stream."""
        number = bisect_right(self.starts, place) - 1
        into = np.array([place - self.starts[number]])
        found: list[int] = (self._seen_FC[number] + self._turns(number).counts(into)[0]).tolist()
        return found

    def _block(self, place: int) -> tuple[int, Counts]:
        """The block a place is in: where it begins, and its samples, (P,)."""
        number = bisect_right(self.starts, place) - 1
        start, length = self.starts[number], self._lengths[number]
        first = (place - start) // BLOCK * BLOCK
        last = first + BLOCK if length is None else min(first + BLOCK, length)
        counts_PC = self._turns(number).counts(np.arange(first, last + 1))
        corpus_P = np.diff(counts_PC, axis=0).argmax(axis=1)  # one has one more at each place
        ranks_P = (self._seen_FC[number] + counts_PC[:-1])[np.arange(last - first), corpus_P]
        sizes_P = self._sizes_C[corpus_P]
        passes_P, places_P = np.divmod(ranks_P, sizes_P)
        keys_P = keys(self._seed, corpus_P, passes_P)
        return start + first, self._first_C[corpus_P] + permuted(places_P, sizes_P, keys_P)

    def _turns(self, number: int) -> Apportionment:
        """How corpora take turns in a phase; the latest is kept."""
        latest, found = self._latest
        if found is None or latest != number:
            parts, length = self._parts_FC[number], self._lengths[number]
            if length is None:  # the last phase has no end
                found = Apportionment(parts)
            else:
                found = turns(length, parts, self._allotted_FC[number])
            self._latest = number, found
        return found


def _between(
    first: tuple[int, list[int]], last: tuple[int, list[int]]
) -> Iterator[tuple[int, list[int]]]:
    """Phases on the line from one to another, that one included."""
    steps = last[0] - first[0]
    pieces = min(steps, PIECES)
    for piece in range(1, pieces + 1):
        far = piece / pieces
        mixed = [(1 - far) * a + far * b for a, b in zip(first[1], last[1], strict=True)]
        yield first[0] + steps * piece // pieces, largest_remainder(PARTS, mixed)


def _parts(num_corpora: int, weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers that add up to ``PARTS``.

    Raises:
        ValueError: If there are not as many, or one is negative, not finite or has no part.
    """
    if len(weights) != num_corpora:
        rule = f"must be as many as there are corpora, {num_corpora}"
        raise argument_error(WHERE, "weights", list(weights), rule)
    for weight in weights:
        number = finite_number(weight)
        if number is None or number < 0:
            raise argument_error(WHERE, "weights", weight, "must be a finite number from 0 on")
    if not any(weights):
        raise argument_error(WHERE, "weights", list(weights), "must not all be 0")
    parts = largest_remainder(PARTS, weights)
    for weight, part in zip(weights, parts, strict=True):
        if weight > 0 and part == 0:
            rule = f"is less than one of {PARTS} samples"
            raise argument_error(WHERE, "weights", weight, rule, "Raise it, or leave it out")
    return parts
