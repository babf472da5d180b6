"""Batches whose size changes with time: which samples batch n has is looked up, never replayed.

Sizes come in *phases*. How many samples come before a batch follows from the phases alone, so a
position is still one number, and a batch far ahead costs what the first one does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Any

from typing_extensions import Self

from lightning_align._errors import argument_error, check_least, check_whole
from lightning_align.data.pacing import CurriculumScheduler

WHERE = "BatchSizes"


class BatchSizes:
    """How many samples each batch has.

    Args:
        phases: Pairs of a batch, counted from 0, and the samples per batch and rank from it on.

    Attributes:
        phases: The same, without those that change nothing.

    Raises:
        ValueError: If the first is not at batch 0, they do not rise, or a size is below 1.

    Example:
        >>> sizes = BatchSizes([(0, 2), (3, 4)])
        >>> [sizes.size(n) for n in range(5)], sizes.before(5)
        ([2, 2, 2, 4, 4], 14)
    """

    def __init__(self, phases: Iterable[tuple[int, int]]) -> None:
        given = [(n, size) for n, size in phases]
        for n, size in given:
            check_whole(WHERE, batch=n, size=size)
            check_least(WHERE, 1, size=size)
        if not given or given[0][0] != 0:
            raise argument_error(WHERE, "phases", given, "the first must be at batch 0")
        if any(first >= second for (first, _), (second, _) in pairwise(given)):
            rule = "each must begin at a later batch than the one before"
            raise argument_error(WHERE, "phases", given, rule)
        before = [(0, 0), *given]
        self.phases = [now for last, now in zip(before, given, strict=False) if last[1] != now[1]]
        self._starts = [n for n, _ in self.phases]
        lengths = [(second[0] - first[0]) * first[1] for first, second in pairwise(self.phases)]
        self._before = [*accumulate(lengths, initial=0)]

    @classmethod
    def scheduled(
        cls,
        scheduler: CurriculumScheduler | Mapping[str, Any],
        *,
        tokens_per_sample: int | None = None,
        num_replicas: int = 1,
    ) -> Self:
        """Sizes that a schedule gives: batch n, counted from 0, has that of step n + 1.

        Args:
            scheduler: Its difficulties are samples per batch and rank.
            tokens_per_sample: Tokens of every sample, for a schedule in tokens: a batch has the
                size of as many as come before it.
            num_replicas: Number of ranks that share a batch, for a schedule in tokens.

        Raises:
            ValueError: If a size is no whole number from 1 on, or a schedule in tokens is not told
                how many there are in a sample.
        """
        if not isinstance(scheduler, CurriculumScheduler):
            scheduler = CurriculumScheduler(scheduler)
        changes = [(place, _size(difficulty)) for place, difficulty in scheduler.changes()]
        if scheduler.unit == "step":
            return cls((step - 1, size) for step, size in changes)
        if tokens_per_sample is None:
            rule = "a schedule in tokens must be told how many a sample has"
            way_out = "Give the tokens of a sample, or total_curriculum_step"
            raise argument_error(WHERE, "tokens_per_sample", None, rule, way_out)
        check_least(WHERE, 1, tokens_per_sample=tokens_per_sample, num_replicas=num_replicas)
        phases, per_row, tokens = [(0, changes[0][1])], tokens_per_sample * num_replicas, 0
        for place, size in changes[1:]:
            begun, per_batch = phases[-1][0], phases[-1][1] * per_row
            batches = max(0, -(-(place - tokens) // per_batch))
            tokens += batches * per_batch
            if not batches:  # one batch goes over several changes
                phases.pop()
            phases.append((begun + batches, size))
        return cls(phases)

    @classmethod
    def at_constant_tokens(
        cls, lengths: CurriculumScheduler | Mapping[str, Any], tokens: int
    ) -> Self:
        """As many samples as have these tokens at the length that a schedule in steps gives.

        Args:
            lengths: Its difficulties are tokens per sample.
            tokens: Tokens per batch and rank, or a little less where lengths do not divide them.

        Raises:
            ValueError: If a length is above that, or the schedule is one in tokens.
        """
        if not isinstance(lengths, CurriculumScheduler):
            lengths = CurriculumScheduler(lengths)
        if lengths.unit != "step":
            rule = "how many samples a batch has must follow from its number"
            way_out = "Give total_curriculum_step or max_step"
            raise argument_error(WHERE, "lengths", "tokens", rule, way_out)
        changes = [(step, _size(length)) for step, length in lengths.changes()]
        longest = max(length for _, length in changes)
        if tokens < longest:
            rule = f"must be at least the greatest length, {longest}"
            raise argument_error(WHERE, "tokens", tokens, rule)
        return cls((step - 1, tokens // length) for step, length in changes)

    def size(self, n: int) -> int:
        """Samples of batch ``n`` on each rank."""
        return self.phases[bisect_right(self._starts, n) - 1][1]

    def before(self, n: int) -> int:
        """Samples of one rank before batch ``n``."""
        number = bisect_right(self._starts, n) - 1
        first, size = self.phases[number]
        return self._before[number] + (n - first) * size

    def batches_for(self, samples: int) -> int:
        """The least number of batches that have so many samples of a rank."""
        number = max(0, bisect_right(self._before, samples) - 1)
        first, size = self.phases[number]
        return first + -(-(samples - self._before[number]) // size)

    @property
    def last(self) -> int:
        """The size from the last change on."""
        return self.phases[-1][1]

    @property
    def greatest(self) -> int:
        """The greatest size."""
        return max(size for _, size in self.phases)

    def plain(self, num_replicas: int) -> list[list[int]]:
        """The phases with sizes over all ranks, as plain data."""
        return [[n, size * num_replicas] for n, size in self.phases]


def _size(difficulty: Any) -> int:
    """A size or a length as an integer.

    Raises:
        ValueError: If it is no whole number from 1 on.
    """
    if difficulty != int(difficulty) or difficulty < 1:
        rule = "gives a number of samples or tokens, which must be whole and at least 1"
        raise argument_error(WHERE, "scheduler", difficulty, rule)
    return int(difficulty)
