"""Which action an alarm gets: a ladder that repeated alarms at one place climb. Plain numbers."""

from collections.abc import Collection, Sequence
from typing import Any

from lightning_align._errors import argument_error, check_choice, check_least

ACTIONS = ("log", "clip", "skip", "rewind", "stop")
ACCEPT = "accept"  # of the level that stays; no rung
NEAR_STEPS = 20  # an alarm at most so many optimizer steps from the last one is at its place


def rungs_of(action: str | Sequence[str]) -> list[str]:
    """The rungs of what a user has given, from the mildest to the strongest.

    Raises:
        ValueError: If one is unknown, if there are none, or if one is milder than the one below it.
    """
    rungs = [action] if isinstance(action, str) else list(action)
    if not rungs:
        rule = f"must have at least one of {', '.join(map(repr, ACTIONS))}"
        raise argument_error("SpikeGuard", "action", action, rule)
    for rung in rungs:
        check_choice("SpikeGuard", "action", rung, ACTIONS)
    if sorted(set(rungs), key=ACTIONS.index) != rungs:
        rule = f"each must be once, in this order: {', '.join(map(repr, ACTIONS))}"
        raise argument_error("SpikeGuard", "action", action, rule)
    return rungs


class Ladder:
    """The rung that the next alarm gets.

    An alarm near the last one is at the same place and climbs a rung, up to the top one, which it
    keeps; one elsewhere begins at the bottom. Rewinds count until the run has got past the place
    that they went back from: what is trained again may raise alarms of its own before it.

    Attributes:
        rewinds: How many there were at that place.

    Args:
        rungs: From ``rungs_of``.
        max_rewinds: Rewinds at one place before the next rung, which is "stop" where there is none.
        max_consecutive_skips: Steps skipped in a row after which the level is taken for a new one.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, rungs: list[str], max_rewinds: int, max_consecutive_skips: int) -> None:
        check_least("SpikeGuard", 1, max_rewinds=max_rewinds)
        check_least("SpikeGuard", 1, max_consecutive_skips=max_consecutive_skips)
        self.rungs = rungs
        self.max_rewinds, self.max_consecutive_skips = max_rewinds, max_consecutive_skips
        self._rung = 0
        self._last: int | None = None  # position of the latest alarm
        self.rewinds = 0
        self._rewound: int | None = None  # position of the farthest alarm that was gone back from
        self._skips = 0  # steps in a row that were skipped

    @property
    def rung(self) -> str:
        """The rung that it stands on; the action of an alarm may be another one there."""
        return self.rungs[self._rung]

    def calm(self) -> None:
        """A step without an alarm was taken."""
        self._skips = 0

    def climb(
        self, position: int, near: int, *, is_finite: bool, useless: Collection[str] = ()
    ) -> str:
        """The action for an alarm.

        Args:
            position: Number of its batch in the stream.
            near: How many batches from the last alarm it is still at the same place.
            is_finite: Whether loss and gradient norm are numbers; else no level can be accepted.
            useless: Actions that would do nothing here. The step is skipped in their place, but for
                "clip" where no rung leaves steps out: then it is taken, if it is finite.
        """
        if self._rewound is not None and position > self._rewound + near:
            self.rewinds, self._rewound = 0, None
        if self._last is None or abs(position - self._last) > near:
            self._rung = 0
        elif self.rungs[self._rung] != "rewind" or self.rewinds >= self.max_rewinds:
            self._rung = min(self._rung + 1, len(self.rungs) - 1)
        self._last = position
        action = self.rungs[self._rung]
        if action == "rewind" and self.rewinds >= self.max_rewinds:
            action = "stop"
        elif action in useless:
            takes = action == "clip" and is_finite and not {"skip", "rewind"} & set(self.rungs)
            action = "log" if takes else "skip"
        if action == "rewind":
            self.rewinds, self._rewound = self.rewinds + 1, max(position, self._rewound or 0)
        self._skips = self._skips + 1 if action == "skip" else 0
        if self._skips > self.max_consecutive_skips:
            self._skips = 0
            action = ACCEPT if is_finite else "stop"
        return action

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as plain data."""
        return {
            "rung": self._rung,
            "last": self._last,
            "rewinds": self.rewinds,
            "rewound": self._rewound,
            "skips": self._skips,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; with fewer rungs than then, on the top one."""
        self._rung = min(state_dict["rung"], len(self.rungs) - 1)
        self._last, self._skips = state_dict["last"], state_dict["skips"]
        self.rewinds = state_dict["rewinds"]
        # Checkpoints of before say no more than where the last alarm was.
        self._rewound = state_dict.get("rewound", self._last if self.rewinds else None)
