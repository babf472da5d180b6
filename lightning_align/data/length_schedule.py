"""Which length the rows of batch n have: a pure function of n, from a schedule by steps or tokens.

A schedule by tokens counts what the batches before have to learn from as they are planned: full
batches at their lengths. So any batch is looked up, on any rank and after a resume, and no count
has to be saved or sent. What a run has really learned from is a little less where a batch was
smaller or had tokens that are not learned.

Shapes: none; n counts batches from 0, a length counts the predictions of a row.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from lightning_align._errors import argument_error
from lightning_align.data.feedback import SelfPaced
from lightning_align.data.pacing import CurriculumScheduler

WHERE = "Curriculum"
MOST_CHANGES = 1 << 16  # that are looked at; a schedule with more has too many lengths anyway


@dataclass(frozen=True)
class Samples:
    """How many samples the batches of a stream have, over all ranks.

    Args:
        before: Samples of the batches before batch n.
        whole: Predictions of a whole sample; None where samples differ.
    """

    before: Callable[[int], int]
    whole: int | None = None

    @staticmethod
    def constant(batch: int, whole: int | None = None) -> Samples:
        """Of batches that all have as many samples."""
        return Samples(lambda n: n * batch, whole)

    def batches_for(self, samples: int) -> int:
        """The least number of batches that have so many samples."""
        # Each has one at least, but for those of a pass that has ended.
        last = 1
        while self.before(last) < samples:
            last *= 2
        return bisect_left(range(last), samples, key=self.before)


class LengthSchedule:
    """Length of every batch.

    Args:
        scheduler: Its difficulties are lengths.
        mode: How a batch is cut, ``"truncate"`` or ``"reshape"``; or ``"bucket"``, in which lengths
            are rounded down to powers of two.
        samples: How many there are in a batch; None if nobody knows.
        max_lengths: Most lengths that there may be.

    Raises:
        ValueError: If there are more lengths than ``max_lengths``, a length is below 1, or a
            schedule by tokens is of batches whose samples nobody knows.
    """

    def __init__(
        self,
        scheduler: CurriculumScheduler | SelfPaced,
        mode: str,
        samples: Samples | None = None,
        max_lengths: int = 64,
    ) -> None:
        self.scheduler, self.mode, self.samples = scheduler, mode, samples
        distinct = self.distinct
        if distinct[0] < 1:
            rule = "a row must have at least 1 token to predict"
            raise argument_error(WHERE, "length.min_difficulty", distinct[0], rule)
        if len(distinct) > max_lengths:
            rule = f"the schedule has {len(distinct)} lengths from {distinct[0]} to {distinct[-1]}"
            way_out = "Raise difficulty_step or max_lengths: what is compiled, or planned by"
            way_out += " shapes, is made anew for each"
            raise argument_error(WHERE, "length.max_lengths", max_lengths, rule, way_out)
        self._by_tokens = scheduler.unit == "tokens"
        self._starts, self._lengths = self._tokens_reached() if self._by_tokens else ([], [])

    @property
    def distinct(self) -> list[int]:
        """All lengths of the schedule, ascending."""
        return sorted({self._length(length) for _, length in self._levels()})

    def length_at(self, n: int) -> int:
        """Length of the rows of batch n."""
        if self._by_tokens:
            return self._lengths[bisect_right(self._starts, n) - 1]
        return self._length(self.scheduler.get_difficulty(n + 1))

    def stretches(self) -> list[tuple[int, int]]:
        """First batch and length of each stretch of one length, ascending from batch 0."""
        if self._by_tokens:
            return [*zip(self._starts, self._lengths, strict=True)]
        return [(step - 1, self._length(length)) for step, length in self._levels()]

    def _length(self, difficulty: float) -> int:
        """The length that a difficulty means."""
        length = int(difficulty)
        return 1 << length.bit_length() - 1 if self.mode == "bucket" and length > 0 else length

    def _levels(self) -> list[tuple[int, float]]:
        return [*islice(self.scheduler.changes(), MOST_CHANGES)]

    def tokens_before(self, n: int) -> int | None:
        """Planned predictions of all batches before batch n, over all ranks; None if unknown."""
        if self.samples is None or self.samples.whole is None:
            return None
        total, stretches = 0, self.stretches()
        ends = [*(begin for begin, _ in stretches[1:]), n]
        for (begin, length), end in zip(stretches, ends, strict=True):
            if begin < n:
                seen = self.samples.before(min(end, n)) - self.samples.before(begin)
                total += seen * self._of_sample(length)
        return total

    def _of_sample(self, length: int) -> int:
        """Predictions of a sample that is cut to a length."""
        assert self.samples is not None
        whole = self.samples.whole
        assert whole is not None
        if length >= whole:
            return whole
        return length if self.mode == "truncate" else whole // length * length

    def _tokens_reached(self) -> tuple[list[int], list[int]]:
        """Where the tokens of all batches before reach a level."""
        if self.samples is None or self.samples.whole is None:
            rule = "a schedule by tokens needs to know how many a batch has"
            way_out = "Give length.block_size, the predictions of a whole row, and"
            way_out += " length.global_batch_size, the rows of a batch over all ranks"
            raise argument_error(WHERE, "length.scheduler", "tokens", rule, way_out)
        (_, first), *levels = [
            (int(tokens), self._length(length)) for tokens, length in self._levels()
        ]
        starts, lengths, tokens = [0], [first], 0
        for reached, length in levels:
            each, before = self._of_sample(lengths[-1]), self.samples.before(starts[-1])
            lacking = -(-(reached - tokens) // each)  # samples until the level is reached
            if lacking <= 0:
                lengths[-1] = length
                continue
            n = self.samples.batches_for(before + lacking)
            tokens += (self.samples.before(n) - before) * each
            starts.append(n)
            lengths.append(length)
        return starts, lengths
