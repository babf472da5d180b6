"""The ``length`` of a Curriculum: its configuration, the schedule, the cut, and what the cut costs.

A batch is cut where ``run/loader.py`` yields it, by its number in the stream alone. Nothing here is
advanced: a loader may run ahead, begin anew or go back.
"""

from collections.abc import Mapping
from itertools import islice
from typing import Any

from lightning_align._errors import argument_error, check_choice, check_least, check_whole
from lightning_align.data.bucket_sampler import BucketSampler
from lightning_align.data.feedback import SelfPaced, scheduler_of
from lightning_align.data.length_schedule import MOST_CHANGES, LengthSchedule, Samples
from lightning_align.data.sequence_length import MODES, RowCutter, with_rows, with_width

WHERE = "Curriculum"
_KEYS = (
    "mode",
    "scheduler",
    "preserve_end_of_sequence",
    "shifted_labels",
    "max_lengths",
    "block_size",
    "global_batch_size",
)
_OF_BUCKETS = ("least", "odds", "cycles")


class LengthPart:
    """Rows of each batch cut to its length.

    Args:
        config: ``mode`` ("truncate", "reshape" or "bucket"), ``scheduler`` (a
            ``CurriculumScheduler``, ``SelfPaced``, or a configuration of one), and optionally
            ``preserve_end_of_sequence`` (true for the tokenizer's end of text, or that token),
            ``shifted_labels`` (of tuples), ``max_lengths`` (64), and for a schedule by tokens on
            data of one's own ``block_size`` and ``global_batch_size``. With "bucket" also
            ``least`` (8), ``odds`` and ``cycles``, see ``BucketBatches``.

    Attributes:
        schedule: Length of every batch, from ``set_up`` on.
        lost: Predictions of this rank's batches that were cut off, of those that were trained.
        sampler: Of buckets, from the set-up of a run on; None in other modes.

    Raises:
        ValueError: If a key is not known or missing, or a value gives no schedule.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        if not isinstance(config, Mapping):
            raise argument_error(WHERE, "length", config, "must be a mapping")
        known = _KEYS + (_OF_BUCKETS if config.get("mode") == "bucket" else ())
        if unknown := sorted(set(config) - set(known)):
            rule = f"knows {', '.join(known)}"
            raise argument_error(WHERE, "length", unknown, rule)
        if missing := [key for key in ("mode", "scheduler") if key not in config]:
            rule = f"needs {' and '.join(missing)}"
            raise argument_error(WHERE, "length", dict(config), rule)
        check_choice(WHERE, "length.mode", config["mode"], (*MODES, "bucket"))
        self.scheduler = scheduler_of(config["scheduler"])
        self.mode: str = config["mode"]
        self.plan = {key: config[key] for key in _OF_BUCKETS if key in config}
        self.sampler: BucketSampler | None = None
        self.max_lengths: int = config.get("max_lengths", 64)
        self.keeps_end: bool | int = config.get("preserve_end_of_sequence", False)
        self.shifted_labels: bool | None = config.get("shifted_labels")
        self._own = tuple(config.get(key) for key in ("block_size", "global_batch_size"))
        counts = {"length.max_lengths": self.max_lengths}
        names = ("length.block_size", "length.global_batch_size")
        counts |= {name: n for name, n in zip(names, self._own, strict=True) if n is not None}
        check_whole(WHERE, **counts)
        check_least(WHERE, 1, **counts)
        if self.keeps_end is not False and self.mode != "truncate":
            rule = "belongs to mode='truncate': a reshaped row goes on in the next one"
            argument = "length.preserve_end_of_sequence"
            raise argument_error(WHERE, argument, self.keeps_end, rule, "Leave it out")
        self.lost = 0
        self._schedule: LengthSchedule | None = None
        self._cutter: RowCutter | None = None
        self._lost_by: dict[int, int] = {}  # of batches that were drawn and not yet trained

    def set_up(self, samples: Samples | None, tokenizer: Any) -> None:
        """Make schedule and cut of what the run knows.

        Args:
            samples: How many the batches have, if the datamodule tells.
            tokenizer: Of the texts, None if nobody knows it.

        Raises:
            ValueError: If there are too many lengths, a schedule by tokens cannot know how many a
                batch has, or the end of text is not known.
        """
        whole, batch = self._own
        if samples is None and whole is not None and batch is not None:
            samples = Samples.constant(batch, whole)
        self._schedule = LengthSchedule(self.scheduler, self.mode, samples, self.max_lengths)
        end = None
        if self.keeps_end is not False:
            end = self.keeps_end if self.keeps_end is not True else _end_of_text(tokenizer)
        # What is longer than a batch may be is reshaped: of powers of two nothing is left over.
        mode = "reshape" if self.mode == "bucket" else self.mode
        self._cutter = RowCutter(mode, self.shifted_labels, end)
        self._lost_by = {}

    @property
    def schedule(self) -> LengthSchedule:
        """Length of every batch; before ``set_up`` of a schedule by steps alone."""
        if self._schedule is None:
            return LengthSchedule(self.scheduler, self.mode, max_lengths=self.max_lengths)
        return self._schedule

    def cut(self, batch: Any, n: int) -> Any:
        """Batch n of the stream, with rows of its length."""
        assert self._cutter is not None
        cut, self._lost_by[n] = self._cutter.cut(batch, self.schedule.length_at(n))
        return cut

    def length_at(self, n: int) -> int:
        """Length of the rows of batch n: what the schedule allows, or what its bucket has."""
        most = self.schedule.length_at(n)
        return most if self.sampler is None else min(most, self.sampler.buckets.length(n))

    def cut_to(self, batch: Any, length: int) -> Any:
        """A batch with rows of a length that nobody counts."""
        assert self._cutter is not None
        if self.sampler is not None:  # its own rows may be shorter, at as many tokens
            longest = int(self.sampler.buckets.lengths[-1])
            rows = self.sampler.batch_size * max(1, longest // length)
            return with_rows(with_width(batch, min(length, longest) + 1), rows)
        return self._cutter.cut(batch, length)[0]

    def count(self, n: int) -> None:
        """Batch n is trained now: what was cut off it is lost."""
        self.lost += self._lost_by.pop(n, 0)
        self._lost_by = {later: lost for later, lost in self._lost_by.items() if later > n}

    def described(self) -> str:
        """How many lengths there are, and which."""
        found = self.schedule.distinct
        named = ", ".join(map(str, found)) if len(found) <= 8 else f"from {found[0]} to {found[-1]}"
        many = "length" if len(found) == 1 else "lengths"
        return f"{self.mode} to {len(found)} {many} ({named})"

    def settings(self) -> dict[str, Any]:
        """What decides how each batch is cut, as plain data."""
        found: dict[str, Any] = {"mode": self.mode, "unit": self.scheduler.unit, **self.plan}
        if isinstance(self.scheduler, SelfPaced):
            found["rule"] = self.scheduler.rule()
        else:
            changes = islice(self.scheduler.changes(), MOST_CHANGES)
            found["lengths"] = [[int(at), int(length)] for at, length in changes]
        return {**found, "preserve_end_of_sequence": self.keeps_end}


def _end_of_text(tokenizer: Any) -> int:
    """The tokenizer's end of text.

    Raises:
        ValueError: If there is none.
    """
    found = getattr(tokenizer, "eos_token_id", None)
    if found is None:
        rule = "no datamodule of the run has a tokenizer with an end of text"
        argument = "length.preserve_end_of_sequence"
        raise argument_error(WHERE, argument, True, rule, "Give the token in its place")
    return int(found)
