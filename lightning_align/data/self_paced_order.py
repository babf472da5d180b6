"""The order of samples where nobody knows yet at which batch the next level begins.

It is that of a ``CurriculumOrder``: groups join by and by, take turns in proportion to their sizes,
and each is seen in passes of its own. But what batch n holds may follow from what is decided by
then alone, and never from where a level will end: so shares are those of the level's batches so
far, and a batch is shuffled in itself.

Shapes: G groups, J of them joined, P samples of a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_align.data.apportionment import Apportionment
from lightning_align.data.curriculum_order import places_shown
from lightning_align.data.eligibility import Levels
from lightning_align.data.feedback import FAR, SelfPaced
from lightning_align.data.keyed_permutation import keys, permuted
from lightning_align.seeds import derive_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Counts = NDArray[np.int64]


class Stage(NamedTuple):
    """Batches in which the same groups have joined.

    Attributes:
        first: Number of its first batch.
        joined: Number J of the groups.
        seen: How many samples of each were drawn before it, (G,).
    """

    first: int
    joined: int
    seen: Counts


class SelfPacedOrder:
    """An endless stream of samples in which a harder group joins where that is decided.

    Args:
        levels: The samples by groups, of a scheduler that had decided nothing.
        scheduler: Whose decisions are looked up.
        batch: Samples of a batch, over all ranks.
        seed: Seed of every order.
        replacement: Draw every sample from all eligible ones, whatever came before.

    Attributes:
        num_eligible: Samples that are eligible when so many groups have joined, (G,).
    """

    def __init__(
        self,
        levels: Levels,
        scheduler: SelfPaced,
        batch: int,
        seed: int = 0,
        *,
        replacement: bool = False,
    ) -> None:
        self.levels, self.scheduler, self.replacement = levels, scheduler, replacement
        self.batch = batch
        self.num_eligible = np.cumsum(levels.sizes)
        self._level_G = [0 if step < FAR else step - FAR for step in levels.steps]
        self._seed = derive_seed("self-paced", seed)
        self._latest: tuple[object, list[int]] | None = None

    def indices(self, first: int, last: int) -> list[int]:
        """Samples ``first`` to ``last`` (exclusive) of the stream.

        Raises:
            ValueError: If the level of one of them is not decided yet.
        """
        found: list[int] = []
        while first < last:
            n, within = divmod(first, self.batch)
            piece = self._batch(n)[within : within + last - first]
            found += piece
            first += len(piece)
        return found

    def level(self, place: int) -> int:
        """Number of the latest group that had joined at a place of the stream."""
        return self._joined(place // self.batch) - 1

    def plan(self) -> dict[str, Any]:
        """What decides when groups join, beside the losses, as plain JSON."""
        return self.scheduler.rule()

    def seen(self, place: int) -> Counts:
        """How many samples of each group were drawn before a place, (G,); without replacement."""
        n, within = divmod(place, self.batch)
        stage = self.stage(n)
        counts = stage.seen + self._shares(stage, n)[0]
        drawn_P = self._places(stage, n)[:within]
        groups_P = np.searchsorted(self.num_eligible, drawn_P, side="right")
        found: Counts = counts + np.bincount(groups_P, minlength=len(counts))
        return found

    def num_unseen(self, place: int) -> int:
        """How many samples, of all groups, were never drawn before a place."""
        if self.replacement:
            drawn = {
                sample
                for n in range(-(-place // self.batch))
                for sample in self._batch(n)[: place - n * self.batch]
            }
            return int(self.num_eligible[-1]) - len(drawn)
        return int(np.maximum(self.levels.sizes - self.seen(place), 0).sum())

    def stage(self, n: int) -> Stage:
        """The stage that batch n is in, by what is decided."""
        stage = Stage(0, self._joined(0), np.zeros(len(self.levels.sizes), dtype=np.int64))
        for decision in self.scheduler.decisions:
            joined = self._joined(decision.batch)
            if decision.batch <= n and joined > stage.joined:
                seen = stage.seen + self._shares(stage, decision.batch)[0]
                stage = Stage(decision.batch, joined, seen)
        return stage

    def _joined(self, n: int) -> int:
        level = self.scheduler.level(n)
        return sum(own <= level for own in self._level_G)

    def _shares(self, stage: Stage, n: int) -> Counts:
        """What each group has had in a stage before batch n, and behind it, (2, G)."""
        sizes_J = self.levels.sizes[: stage.joined]
        places = np.array([n - stage.first, n + 1 - stage.first]) * self.batch
        found = np.zeros((2, len(self.levels.sizes)), dtype=np.int64)
        found[:, : stage.joined] = Apportionment(sizes_J).counts(places)
        return found

    def _batch(self, n: int) -> list[int]:
        """All samples of batch n; those of the latest one are kept."""
        self.scheduler.check_decided(n)
        key = n, *self.scheduler.decisions  # which are others where a run has gone back
        if self._latest is None or self._latest[0] != key:
            self._latest = key, self.levels.samples[self._places(self.stage(n), n)].tolist()
        return self._latest[1]

    def _places(self, stage: Stage, n: int) -> Counts:
        """Places of batch n in ``levels.samples``, (P,)."""
        if self.replacement:
            drawn_P = keys(self._seed, n, np.arange(self.batch)) >> np.uint64(11)
            share = 2.0**-53 * float(self.num_eligible[stage.joined - 1])
            return (drawn_P * share).astype(np.int64)
        before_G, behind_G = self._shares(stage, n)
        taken_G = behind_G - before_G
        groups_P = np.repeat(np.arange(len(taken_G)), taken_G)
        ranks_P = np.arange(self.batch) - np.repeat(np.cumsum(taken_G) - taken_G, taken_G)
        ranks_P += before_G[groups_P]
        ranks_P += stage.seen[groups_P]
        seen_G = stage.seen if stage.joined == len(self.levels.sizes) else None
        places_P = places_shown(self.levels, self._seed, groups_P, ranks_P, seen_G)
        mixed_P = np.arange(self.batch)
        keys_P = np.broadcast_to(keys(self._seed, n), mixed_P.shape)
        return places_P[permuted(mixed_P, np.full_like(mixed_P, self.batch), keys_P)]
