"""Self-paced curricula: the next level begins when the loss of the present one has flattened.

A decision is a pair (batch n, level): from batch n on the level holds. It is taken when a loss is
known, and takes effect a fixed *lag* of batches later. That has a reason, although samplers run in
the main process and could read a decision at once: a DataLoader draws the indices of
``prefetch_factor * num_workers`` batches before they are trained, and Lightning fetches one more
where data have no length. A decision that took effect at once would reach another batch with other
workers, and another one in a run that is resumed, whose loader begins anew. With the lag every
batch that anybody can have drawn is decided, so that batch n is a pure function of seed, n and the
decisions, which are in the checkpoint.

The rule is that of torch's ``ReduceLROnPlateau`` with a relative threshold, on means of losses over
blocks of batches: one batch says little. It is a pure function of the losses of a level.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_least, check_whole, finite_number
from lightning_align.data.pacing import CurriculumScheduler

WHERE = "SelfPaced"
MOST_LEVELS = 1000
FAR = 1 << 40  # step from which on the levels begin that nobody has decided on


class Decision(NamedTuple):
    """From batch ``batch`` on, counted from 0, level number ``level`` holds."""

    batch: int
    level: int


def has_flattened(means: Sequence[float], threshold: float, patience: int) -> bool:
    """Whether losses no longer fall: more than ``patience`` means in a row were not the best.

    Args:
        means: Mean losses of blocks of batches of one level, in their order.
        threshold: By what part of the best one a mean must be lower to be better.
        patience: How many that are not better are waited for.
    """
    best, worse = math.inf, 0
    for mean in means:
        if mean < best * (1 - math.copysign(threshold, best)):  # losses below zero fall as well
            best, worse = mean, 0
        else:
            worse += 1
    return worse > patience


@declared
class SelfPaced:
    """Difficulty that goes up a level when the loss of the present one flattens.

    It is asked as a ``CurriculumScheduler`` is, by ``get_difficulty(step)``. What it says holds for
    the batches that are decided: up to ``lag`` of them ahead of what was trained.

    Keys of ``schedule_config``: either ``difficulty_step``, with which the levels are its multiples
    between ``min_difficulty`` and ``max_difficulty``, or ``difficulty``, a list of them; ``window``
    (optimizer steps whose losses make a mean, 50), ``threshold`` (0.01), ``patience`` (0) and
    ``lag`` (batches, 64).

    Args:
        config: ``min_difficulty``, ``max_difficulty``, ``schedule_type`` ("self_paced") and
            ``schedule_config``.

    Attributes:
        levels: Difficulty of each level.
        lag: Batches from a decision to its effect.
        decisions: All so far, the first being (0, 0).
        position: Number of the batch that comes next in training.

    Raises:
        ValueError: If a key is missing or not known, or a value is out of its range.

    Example:
        >>> paced = SelfPaced({
        ...     "min_difficulty": 64, "max_difficulty": 128, "schedule_type": "self_paced",
        ...     "schedule_config": {"difficulty_step": 64, "window": 2, "lag": 3}})
        >>> decided = [paced.observe(n + 1, 9.0) for n in range(4)]
        >>> decided.pop()
        Decision(batch=7, level=1)
        >>> {n: paced.get_difficulty(n + 1) for n in (6, 7)}
        {6: 64, 7: 128}
    """

    unit = "step"

    def __init__(self, config: Mapping[str, Any]) -> None:
        missing = [key for key in ("min_difficulty", "max_difficulty") if key not in config]
        if missing:
            raise argument_error(WHERE, "config", dict(config), f"needs {', '.join(missing)}")
        if config.get("schedule_type", "self_paced") != "self_paced":
            rule = "must be 'self_paced'"
            raise argument_error(WHERE, "schedule_type", config["schedule_type"], rule)
        self._config = dict(config)
        given = dict(config.get("schedule_config") or {})
        self.levels = _levels(config["min_difficulty"], config["max_difficulty"], given)
        self.min_difficulty, self.max_difficulty = self.levels[0], self.levels[-1]
        options = {**_DEFAULTS, **given}
        if unknown := sorted(options.keys() - _DEFAULTS.keys()):
            rule = f"does not know {', '.join(unknown)}"
            raise argument_error(WHERE, "schedule_config", given, rule)
        self.window, self.patience, self.lag = (
            options[key] for key in ("window", "patience", "lag")
        )
        check_whole(WHERE, window=self.window, patience=self.patience, lag=self.lag)
        check_least(WHERE, 1, window=self.window, lag=self.lag)
        check_least(WHERE, 0, patience=self.patience)
        self.threshold = finite_number(options["threshold"])
        if self.threshold is None or not 0 <= self.threshold < 1:
            rule = "must be in [0, 1), a part of the best mean loss"
            raise argument_error(WHERE, "threshold", options["threshold"], rule)
        self.decisions = [Decision(0, 0)]
        self.position = 0
        self._means: list[float] = []  # of the present level
        self._losses: list[float] = []  # of the open block

    def level(self, n: int) -> int:
        """Number of the level that holds in batch n, by what is decided."""
        if n + 1 >= FAR:  # where `changes` has the levels that nobody has decided on
            return min(n + 1 - FAR, len(self.levels) - 1)
        number = bisect_right(self.decisions, n, key=lambda decision: decision.batch)
        return self.decisions[number - 1].level

    def get_difficulty(self, step: int) -> Any:
        """Greatest difficulty that is allowed at a step, by what is decided.

        Args:
            step: Number of the step, which trains batch ``step - 1``.

        Raises:
            ValueError: If the step is negative.
        """
        if step < 0:
            raise argument_error(WHERE, "step", step, "must not be negative")
        return self.levels[self.level(max(step - 1, 0))]

    def undecided(self) -> SelfPaced:
        """The same before it had decided anything."""
        return SelfPaced(self._config)

    def check_decided(self, n: int) -> None:
        """Refuse to draw a batch whose level is not known yet.

        Args:
            n: Number of the batch.

        Raises:
            ValueError: If it is more than ``lag`` batches ahead of training.
        """
        # The next loss is that of batch `position`; what it decides holds `lag` behind the next.
        if n > self.position + self.lag:
            ahead = n - self.position
            rule = f"batch {n} is drawn {ahead} batches ahead of training, and its level may change"
            way_out = (
                f"Set it to {ahead} or more; the sampler of a loader of your own hears of losses"
            )
            way_out += " by Curriculum(order={'sampler': sampler})"
            raise argument_error(WHERE, "lag", self.lag, rule, way_out)

    def observe(self, position: int, loss: float | None = None) -> Decision | None:
        """Take note of a trained batch, and of a step's loss if one was taken with it.

        A loss that is not finite is left out.

        Args:
            position: Number of the batch that comes next.
            loss: Mean loss of the optimizer step, the same on every rank.

        Returns:
            The decision that this loss has brought about.
        """
        self.position = position
        latest = self.decisions[-1]
        is_last = latest.level == len(self.levels) - 1
        # Until a decision takes effect losses are of the level before, which is over.
        if loss is None or not math.isfinite(loss) or is_last or position <= latest.batch:
            return None
        self._losses.append(loss)
        if len(self._losses) < self.window:
            return None
        self._means.append(math.fsum(self._losses) / self.window)
        self._losses = []
        assert self.threshold is not None
        if not has_flattened(self._means, self.threshold, self.patience):
            return None
        self._means = []
        decision = Decision(position + self.lag, latest.level + 1)
        self.decisions.append(decision)
        return decision

    def changes(self) -> Iterator[tuple[int, Any]]:
        """Steps from which each level holds; those that are not decided on are far away."""
        for batch, level in self.decisions:
            yield batch + 1, self.levels[level]
        for level in range(self.decisions[-1].level + 1, len(self.levels)):
            yield FAR + level, self.levels[level]

    @property
    def end(self) -> int:
        """A step behind which nothing changes."""
        return FAR + len(self.levels)

    def rule(self) -> dict[str, Any]:
        """What decides, beside the losses, as plain JSON."""
        names = ("levels", "window", "threshold", "patience", "lag")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Decisions, and losses of the level that is not over, as plain JSON."""
        return {
            "rule": self.rule(),
            "decisions": [list(decision) for decision in self.decisions],
            "position": self.position,
            "means": list(self._means),
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what was decided when the state was made.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ValueError: If it was decided by another rule.
        """
        own = self.rule()
        for name, value in state["rule"].items():
            if own.get(name) != value:
                rule = f"the checkpoint was written with {value!r}"
                way_out = "Resume with the same, or start a new run from the weights"
                raise argument_error(WHERE, name, own.get(name), rule, way_out)
        self.decisions = [Decision(batch, level) for batch, level in state["decisions"]]
        self.position = state["position"]
        self._means, self._losses = list(state["means"]), list(state["losses"])


def scheduler_of(config: Any) -> CurriculumScheduler | SelfPaced:
    """The scheduler of a configuration; one that is there already is left as it is.

    Args:
        config: A scheduler, or the mapping that one is made of.

    Raises:
        ValueError: If it gives no schedule.
    """
    if isinstance(config, (CurriculumScheduler, SelfPaced)):
        return config
    paced = isinstance(config, Mapping) and config.get("schedule_type") == "self_paced"
    return SelfPaced(config) if paced else CurriculumScheduler(config)


def check_lag(lag: int, num_workers: int, prefetch_factor: int | None) -> None:
    """Refuse a lag shorter than what a DataLoader and Lightning draw ahead of training.

    Args:
        lag: Batches from a decision to its effect.
        num_workers: Of the loader.
        prefetch_factor: Of the loader.

    Raises:
        ValueError: If batches would be drawn whose level is not decided.
    """
    # Behind the loader Lightning may hold one batch more, to notice the end of data.
    ahead = (prefetch_factor or 2) * num_workers + 1
    if lag < ahead:
        rule = f"{num_workers} workers and Lightning draw up to {ahead} batches ahead of training"
        way_out = f"Set it to {ahead} or more, or lower num_workers"
        raise argument_error(WHERE, "lag", lag, rule, way_out)


_DEFAULTS = {"window": 50, "threshold": 0.01, "patience": 0, "lag": 64}


def _levels(least: Any, greatest: Any, schedule: dict[str, Any]) -> list[Any]:
    """The difficulties that ``schedule`` names, whose keys for them are taken out.

    Raises:
        ValueError: If they do not rise, or are no finite numbers.
    """
    for argument, value in (("min_difficulty", least), ("max_difficulty", greatest)):
        if finite_number(value) is None:
            raise argument_error(WHERE, argument, value, "must be a finite number")
    step, listed = schedule.pop("difficulty_step", None), schedule.pop("difficulty", None)
    if (step is None) == (listed is None):
        rule = "needs one of difficulty_step and difficulty, a list"
        raise argument_error(WHERE, "schedule_config", schedule, rule)
    if listed is None:
        width = finite_number(step)
        if width is None or width <= 0:
            raise argument_error(WHERE, "difficulty_step", step, "must be positive")
        first, behind = math.floor(least / step) + 1, math.ceil(greatest / step)
        listed = [least, *(number * step for number in range(first, behind)), greatest]
    rises = all(first < second for first, second in pairwise(listed))
    if any(finite_number(value) is None for value in listed) or not rises:
        raise argument_error(WHERE, "difficulty", listed, "must be finite numbers that rise")
    if (listed[0], listed[-1]) != (least, greatest):
        rule = f"must begin at min_difficulty, {least}, and end at max_difficulty, {greatest}"
        raise argument_error(WHERE, "difficulty", list(listed), rule)
    if not 2 <= len(listed) <= MOST_LEVELS:
        rule = f"must have 2 to {MOST_LEVELS} levels, and has {len(listed)}"
        raise argument_error(WHERE, "difficulty", [least, greatest], rule)
    return list(listed)
