"""Pacing: how difficult the samples of a step may be, as a pure function of the step.

The keys and the values are those of DeepSpeed's ``CurriculumScheduler`` (0.19.8), its rounding
included: what is ``fixed_...`` there is the same number here at every step. Beside it stand two
schedules of papers, and schedules by tokens. Nothing is remembered: a schedule is asked, never
advanced.

Shapes: none; a difficulty is one number.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import pairwise
from typing import Any

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_choice, finite_number

WHERE = "CurriculumScheduler"


def root(progress: float, degree: float) -> float:
    """Share of the way at a progress from 0 on: the root of it, 1 at 1 and beyond it behind."""
    return float(progress ** (1.0 / degree))


def competence(progress: float, start: float, degree: float) -> float:
    """Competence at a progress in [0, 1], from ``start`` to 1 (arXiv:1903.09848, Eq. 8)."""
    return float((progress * (1 - start**degree) + start**degree) ** (1.0 / degree))


def half_cosine(progress: float) -> float:
    """From 0 to 1 along half a cosine: slow at both ends."""
    return 0.5 * (1 - math.cos(math.pi * progress))


@declared
class CurriculumScheduler:
    """What a curriculum allows at a step: DeepSpeed's configuration, without its state.

    ``schedule_type`` is one of

    - ``"fixed_linear"`` and ``"fixed_root"``: from the least to the greatest difficulty in
      ``total_curriculum_step`` steps, rounded down to a multiple of ``difficulty_step``. As in
      DeepSpeed a greatest difficulty that is no such multiple is reached late;
    - ``"fixed_discrete"``: ``difficulty[i]`` up to step ``max_step[i]``, then the last one;
    - ``"custom"``: a function of the step;
    - ``"cosine"`` and ``"competence"`` (arXiv:1903.09848; ``root_degree`` 2 unless given, and the
      competence at the start is ``min_difficulty / max_difficulty``): rounded down likewise, with
      the greatest difficulty exactly at the end.

    With ``total_curriculum_tokens``, or ``max_tokens``, in the place of the key that counts steps,
    all that is called a step here is a number of tokens.

    Args:
        config: ``min_difficulty``, ``max_difficulty``, ``schedule_type`` and ``schedule_config``.
        function: Difficulty at a step, for ``"custom"``.

    Attributes:
        unit: What the schedule counts, ``"step"`` or ``"tokens"``.

    Raises:
        ValueError: If a key is missing or not known, or a value gives no schedule.

    Example:
        >>> scheduler = CurriculumScheduler({
        ...     "min_difficulty": 8, "max_difficulty": 64, "schedule_type": "fixed_linear",
        ...     "schedule_config": {"total_curriculum_step": 100, "difficulty_step": 8}})
        >>> [scheduler.get_difficulty(step) for step in (1, 50, 100, 1000)]
        [8, 32, 64, 64]
    """

    def __init__(
        self, config: Mapping[str, Any], function: Callable[[int], float] | None = None
    ) -> None:
        missing = [key for key in _KEYS if key not in config and key != "schedule_config"]
        if missing:
            raise argument_error(WHERE, "config", dict(config), f"needs {', '.join(missing)}")
        check_choice(WHERE, "schedule_type", config["schedule_type"], _SCHEDULES)
        self.schedule_type: str = config["schedule_type"]
        self.min_difficulty = _finite(config, "min_difficulty")
        self.max_difficulty = _finite(config, "max_difficulty")
        if self.min_difficulty > self.max_difficulty:
            rule = f"must not be above max_difficulty, {self.max_difficulty}"
            raise argument_error(WHERE, "min_difficulty", self.min_difficulty, rule)
        self._schedule = dict(config.get("schedule_config") or {})
        self.unit = "tokens" if _TOKEN_KEYS.keys() & self._schedule else "step"
        for tokens, step in _TOKEN_KEYS.items():
            if tokens in self._schedule:
                self._schedule[step] = self._schedule.pop(tokens)
        self.function = function
        self._at, check = _SCHEDULES[self.schedule_type]
        check(self)

    def set_custom_get_difficulty(self, function: Callable[[int], float]) -> None:
        """Set the function of a ``"custom"`` schedule, under the name that DeepSpeed gives this."""
        self.function = function

    def get_difficulty(self, step: int) -> Any:
        """Greatest difficulty that is allowed at a step; training begins with step 1.

        Args:
            step: Number of the step, or of tokens learned from, as ``unit`` says.

        Raises:
            ValueError: If the step is negative, or a function of the user gives no finite number.
        """
        if step < 0:
            raise argument_error(WHERE, "step", step, "must not be negative")
        return self._at(self, step)

    def changes(self) -> Iterator[tuple[int, Any]]:
        """Where the difficulty changes, one after the other: a step, and what holds from it on.

        The first is at step 1, the last at ``end`` or before.

        Raises:
            ValueError: If a custom schedule has no function or no ``total_curriculum_step``.
        """
        if self.schedule_type not in ("fixed_discrete", "custom"):
            yield from self._rises()
            return
        steps: Iterable[int] = range(1, self.end + 1)
        if self.schedule_type == "fixed_discrete":
            last_steps = self._schedule["max_step"]
            steps = [1, *(math.floor(step) + 1 for step in last_steps if step >= 1)]
        before: Any = None
        for step in steps:
            difficulty = self.get_difficulty(step)
            if difficulty != before:
                yield step, difficulty
            before = difficulty

    @property
    def end(self) -> int:
        """A step from which on nothing changes.

        Raises:
            ValueError: If a custom schedule has no ``total_curriculum_step``.
        """
        if self.schedule_type == "fixed_discrete":
            return int(max(self._schedule["max_step"])) + 1
        last = self._schedule.get("total_curriculum_step")
        if last is None:
            rule = "a custom schedule that orders samples must say when it ends"
            raise argument_error(WHERE, "schedule_config", self._schedule, rule, _SAY_END)
        end: int = math.ceil(last)
        if self.schedule_type != "custom":
            while self.get_difficulty(end) < self.max_difficulty:  # fixed ones may be late
                end *= 2
        return end

    def _rises(self) -> Iterator[tuple[int, Any]]:
        """The changes of a schedule that never falls."""
        step, stride, end = 1, 1, self.end
        now, greatest = self.get_difficulty(1), self.max_difficulty
        yield step, now
        while now < greatest:
            # Most rises are about as far away as the last one was: looked for from there, in
            # growing strides, first up to what is above, then down to what is not.
            low, high, reach = step, min(step + stride, end), 1
            while (above := self.get_difficulty(high)) <= now:
                low, high, reach = high, min(high + reach, end), 2 * reach
            reach = 1
            while high - reach > low and (nearer := self.get_difficulty(high - reach)) > now:
                high, above, reach = high - reach, nearer, 2 * reach
            low = max(low, high - reach)
            if high - low > 1:
                later = range(low + 1, high)
                high = (
                    low + 1 + bisect_left(later, True, key=lambda n: self.get_difficulty(n) > now)
                )
                above = self.get_difficulty(high)
            step, stride, now = high, high - step, above
            yield step, now

    def _fixed_root(self, step: int) -> Any:
        degree = self._schedule["root_degree"] if self.schedule_type == "fixed_root" else 1
        share = root(float(step) / self._schedule["total_curriculum_step"], degree)
        reached = share * (self.max_difficulty - self.min_difficulty) + self.min_difficulty
        multiple = self._schedule["difficulty_step"]
        floored = math.floor(reached)
        floored -= floored % multiple
        # DeepSpeed's: the first multiple at or above the least difficulty, not that one itself.
        floored = max(floored, -(-self.min_difficulty // multiple) * multiple)
        return min(floored, self.max_difficulty)

    def _fixed_discrete(self, step: int) -> Any:
        last_steps = self._schedule["max_step"]
        return self._schedule["difficulty"][bisect_left(last_steps, step)]

    def _custom(self, step: int) -> Any:
        if self.function is None:
            rule = "a custom schedule needs a function of the step"
            raise argument_error(WHERE, "function", None, rule)
        difficulty = self.function(step)
        if finite_number(difficulty) is None:
            rule = f"must give a finite number, and gave {difficulty!r} at step {step}"
            raise argument_error(WHERE, "function", self.function, rule)
        return difficulty

    def _smooth(self, step: int) -> Any:
        progress = step / self._schedule["total_curriculum_step"]
        if progress >= 1:
            return self.max_difficulty
        if self.schedule_type == "cosine":
            width = self.max_difficulty - self.min_difficulty
            reached = self.min_difficulty + width * half_cosine(progress)
        else:
            start, degree = self.min_difficulty / self.max_difficulty, self._schedule["root_degree"]
            reached = self.max_difficulty * competence(progress, start, degree)
        multiple = self._schedule["difficulty_step"]
        return max(self.min_difficulty, math.floor(reached / multiple) * multiple)

    def _check_rising(self) -> None:
        needed = {"total_curriculum_step", "difficulty_step"}
        if self.schedule_type == "fixed_root":
            needed.add("root_degree")
        self._check_keys(needed, optional={"root_degree"})
        if self.schedule_type in ("cosine", "competence"):
            self._schedule.setdefault("root_degree", 2)
        for key in self._schedule:
            if _finite(self._schedule, key) <= 0:
                raise argument_error(WHERE, key, self._schedule[key], "must be positive")
        if self.schedule_type == "competence" and self.min_difficulty <= 0:
            rule = "must be positive: the competence at the start is its part of max_difficulty"
            raise argument_error(WHERE, "min_difficulty", self.min_difficulty, rule)
        multiple = self._schedule["difficulty_step"]
        width = self.max_difficulty - self.min_difficulty
        if 0 < width < multiple:
            if -(-self.min_difficulty // multiple) * multiple >= self.max_difficulty:
                rule = f"leaves one difficulty, {self.max_difficulty}, at every step"
                way_out = f"It must divide the range from {self.min_difficulty} to that"
                raise argument_error(WHERE, "difficulty_step", multiple, rule, way_out)
            warnings.warn(
                f"{WHERE}(difficulty_step={multiple}): is beyond the range, {width}",
                stacklevel=4,
            )

    def _check_discrete(self) -> None:
        self._check_keys({"difficulty", "max_step"})
        difficulties, last_steps = self._schedule["difficulty"], self._schedule["max_step"]
        for key, values in (("difficulty", difficulties), ("max_step", last_steps)):
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise argument_error(WHERE, key, values, "must be a list of numbers")
            if any(finite_number(value) is None for value in values):
                raise argument_error(WHERE, key, values, "must be a list of finite numbers")
        if len(difficulties) != len(last_steps) + 1:
            rule = f"must be one more than there are in max_step, {len(last_steps)}"
            way_out = "The last difficulty holds for all following steps"
            raise argument_error(WHERE, "difficulty", list(difficulties), rule, way_out)
        if any(first > second for first, second in pairwise(last_steps)):
            raise argument_error(WHERE, "max_step", list(last_steps), "must not fall")
        if max(difficulties) < self.max_difficulty:
            warnings.warn(
                f"{WHERE}(difficulty={list(difficulties)}): never reaches max_difficulty, "
                f"{self.max_difficulty}",
                stacklevel=4,
            )

    def _check_custom(self) -> None:
        self._check_keys(set(), optional={"total_curriculum_step"})
        if "total_curriculum_step" in self._schedule:
            end = _finite(self._schedule, "total_curriculum_step")
            if end < 1:
                raise argument_error(WHERE, "total_curriculum_step", end, "must be at least 1")

    def _check_keys(self, needed: Set[str], optional: Set[str] = frozenset()) -> None:
        given = set(self._schedule)
        if missing := sorted(needed - given):
            rule = f"{self.schedule_type} needs {', '.join(missing)}"
            raise argument_error(WHERE, "schedule_config", self._schedule, rule)
        if unknown := sorted(given - needed - optional):
            rule = f"{self.schedule_type} knows {', '.join(sorted(needed | optional)) or 'no key'}"
            raise argument_error(WHERE, "schedule_config", unknown, rule)


def _finite(config: Mapping[str, Any], key: str) -> Any:
    """A number as it was given: an integer stays one.

    Raises:
        ValueError: If it is none, or not finite.
    """
    if finite_number(config[key]) is None:
        raise argument_error(WHERE, key, config[key], "must be a finite number")
    return config[key]


_KEYS = ("min_difficulty", "max_difficulty", "schedule_type", "schedule_config")
_TOKEN_KEYS = {"total_curriculum_tokens": "total_curriculum_step", "max_tokens": "max_step"}
_SAY_END = "Give total_curriculum_step: from there on its difficulty must stay"
# schedule_type -> difficulty at a step, and the check of its configuration.
_SCHEDULES: dict[
    str, tuple[Callable[[CurriculumScheduler, int], Any], Callable[[CurriculumScheduler], None]]
] = {
    "fixed_linear": (CurriculumScheduler._fixed_root, CurriculumScheduler._check_rising),
    "fixed_root": (CurriculumScheduler._fixed_root, CurriculumScheduler._check_rising),
    "fixed_discrete": (CurriculumScheduler._fixed_discrete, CurriculumScheduler._check_discrete),
    "custom": (CurriculumScheduler._custom, CurriculumScheduler._check_custom),
    "cosine": (CurriculumScheduler._smooth, CurriculumScheduler._check_rising),
    "competence": (CurriculumScheduler._smooth, CurriculumScheduler._check_rising),
}
