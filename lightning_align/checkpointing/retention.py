"""Which checkpoints of a run are kept: the best k by a score, and the newest if asked for.

A checkpoint counts once it is durable. One that is still being written takes part in the decision
whether another is worth saving, but nothing is given up for it before it is committed.
"""

import math
import threading
from collections.abc import Iterable
from typing import Any


class Retention:
    """The checkpoints of one folder; commits may come from another thread.

    Args:
        save_top_k: Number of checkpoints to keep by score; -1 keeps all, 0 none.
        mode: Whether the ``min`` or the ``max`` score is best.
        keep_newest: Whether the newest is kept whatever its score.
    """

    def __init__(self, save_top_k: int, mode: str, keep_newest: bool) -> None:
        self.save_top_k, self.keep_newest = save_top_k, keep_newest
        self._sign = 1.0 if mode == "min" else -1.0
        self._ranked: dict[str, float] = {}  # committed -> score, in the order of the commits
        self._pending: dict[str, float | None] = {}  # being written -> score; None: newest only
        self._stored: dict[str, None] = {}  # committed and not given up, in order
        self._protected: set[str] = set()
        self._abandoned: dict[str, int] = {}  # committed, and left by going back -> step
        self._withdrawn: set[str] = set()  # left by going back in mid-run; they may be pending
        self.latest_score: float | None = None  # of the last commit that was ranked
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @property
    def ranked(self) -> dict[str, float]:
        """Committed checkpoints that are kept for their score, the best first."""
        with self._lock:
            return dict(sorted(self._ranked.items(), key=lambda item: self._cost(item[1])))

    @property
    def worst(self) -> str:
        """The one that a better checkpoint takes the place of; empty while there is room."""
        with self._lock:
            full = self.save_top_k < 0 or len(self._ranked) == self.save_top_k
            return self._worst() if full and self._ranked else ""

    @property
    def worst_score(self) -> float:
        """What a score must be better than; of a run that has room, the worst that there is."""
        with self._lock:
            return self._ranked[worst] if (worst := self.worst) else self._sign * math.inf

    @property
    def newest(self) -> str:
        """The newest committed checkpoint, or an empty string."""
        with self._lock:
            return next(reversed(self._stored), "")

    def admits(self, score: float) -> bool:
        """Whether a checkpoint of this value of the monitored metric would be among the best."""
        with self._lock:
            pending = [item for item in self._pending.items() if item[0] not in self._withdrawn]
            waiting = {name: score for name, score in pending if score is not None}
            rivals = sorted(map(self._cost, {**self._ranked, **waiting}.values()))
        if self.save_top_k < 0 or len(rivals) < self.save_top_k:
            return True
        return self.save_top_k > 0 and self._cost(score) < rivals[self.save_top_k - 1]

    def begin(self, name: str, score: float | None) -> None:
        """A checkpoint is about to be written.

        Args:
            name: The checkpoint's.
            score: Its value of the monitored metric, or None if it is only kept as the newest.
        """
        with self._lock:
            self._pending[name] = score

    def drop(self, name: str) -> None:
        """A checkpoint will not be committed after all."""
        with self._lock:
            self._pending.pop(name, None)
            self._withdrawn.discard(name)

    def commit(self, name: str, step: int = -1) -> list[str]:
        """A checkpoint is durable; returns those that need not be kept any longer.

        Args:
            name: The checkpoint's.
            step: The step it was saved at; what was abandoned up to it goes, unless all are kept.
        """
        with self._lock:
            score = self._pending.pop(name, None)
            if name in self._withdrawn:  # it was being written when the run went back
                return []
            self._stored.pop(name, None)
            self._stored[name] = None
            if score is not None:
                self._ranked[name] = self.latest_score = score
            while 0 <= self.save_top_k < len(self._ranked):
                del self._ranked[self._worst()]
            kept = {*self._ranked, *self._protected, *([name] if self.keep_newest else [])}
            surplus = [stored for stored in self._stored if stored not in kept]
            for stored in surplus:
                del self._stored[stored]
            return list(dict.fromkeys([*surplus, *self._replaced(step), *self._taken_back()]))

    def _taken_back(self) -> list[str]:
        """Withdrawn checkpoints, now that there is a newer one; even where all are kept."""
        gone = self._withdrawn - self._protected - self._pending.keys()
        self._withdrawn -= gone
        return sorted(gone)

    def withdraw(self, names: Iterable[str]) -> None:
        """The run has gone back behind these, and takes another way: none is best or newest.

        They stay until another checkpoint is committed. Some may still be being written.
        """
        if not (names := set(names)):
            return
        with self._lock:
            self._withdrawn |= names
            for name in names:
                self._stored.pop(name, None)
                self._ranked.pop(name, None)
            self.latest_score = self._ranked.get(self.newest)

    def _replaced(self, step: int) -> list[str]:
        """Abandoned checkpoints whose steps the run has come to again."""
        if self.save_top_k < 0:
            return []
        passed = {name for name, at in self._abandoned.items() if at <= step} - self._protected
        for name in passed:
            del self._abandoned[name]
        return sorted(passed)

    def abandon(self, steps: dict[str, int]) -> None:
        """These, with their steps, are of a way that the run has left: none is best or newest.

        They stay until a checkpoint of their step, or of a later one, is committed.
        """
        with self._lock:
            self._abandoned = dict(steps)
            for name in steps:
                self._stored.pop(name, None)
                self._ranked.pop(name, None)

    def expected(self) -> "Retention":
        """What this will be once all that is being written is committed."""
        after = Retention(self.save_top_k, "min" if self._sign > 0 else "max", self.keep_newest)
        with self._lock:
            after._ranked, after._stored = dict(self._ranked), dict(self._stored)
            after._protected, after._pending = set(self._protected), dict(self._pending)
            after._withdrawn = set(self._withdrawn)
            after.latest_score = self.latest_score
        for name in list(after._pending):
            after.commit(name)
        return after

    def protect(self, name: str) -> None:
        """Never give up this one."""
        self._protected.add(name)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to say; what is pending may have been committed when it is read."""
        with self._lock:
            return {
                "ranked": dict(self._ranked),
                "pending": {n: s for n, s in self._pending.items() if n not in self._withdrawn},
                "stored": list(self._stored),
                "latest_score": self.latest_score,
            }

    def load_state_dict(self, state: dict[str, Any], committed: set[str]) -> list[str]:
        """Go on from ``state_dict``; returns those that need not be kept any longer.

        Args:
            state: As ``state_dict`` of an earlier process returned it.
            committed: Names of the checkpoints that are there now.
        """
        surplus = []
        self._pending = {}
        committed = committed - self._abandoned.keys() - self._withdrawn
        with self._lock:
            self._stored = {name: None for name in state["stored"] if name in committed}
            self._ranked = {n: score for n, score in state["ranked"].items() if n in committed}
            self.latest_score = state.get("latest_score")
            for name, score in state["pending"].items():
                if name in committed:
                    self._pending[name] = score
                    surplus += self.commit(name)
        return surplus

    def _worst(self) -> str:
        """Of equal scores the earliest, as ModelCheckpoint has it."""
        return max(self._ranked, key=lambda name: self._cost(self._ranked[name]))

    def _cost(self, score: float) -> float:
        """Lower is better; NaN is worst."""
        return math.inf if math.isnan(score) else self._sign * score
