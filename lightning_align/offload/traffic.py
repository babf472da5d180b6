"""What transfers cost a run: bytes, time that it waited for them, and events of single steps.

Bytes and waits are always counted. Events are recorded while somebody has asked for them: a phase
(forward, backward, update, commit), a wait in it, and each piece that a thread has moved.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, NamedTuple

READ, WRITE, SYNC, STALL = "read", "write", "sync", "stall"


class Event(NamedTuple):
    """What happened, from when to when by ``time.perf_counter``."""

    what: str
    start_s: float
    end_s: float


class Traffic:
    """Of all files of a store.

    Attributes:
        read: Bytes.
        written: Bytes.
        stalled_s: Seconds that the thread which computes has waited for transfers.
        committing_s: Seconds that it has spent within ``commits``, but for waits.
        moving_s: Seconds in which anything was being moved.
    """

    def __init__(self) -> None:
        self.read = self.written = 0
        self.stalled_s = self.moving_s = self.committing_s = 0.0
        self._lock, self._active, self._since = threading.Lock(), 0, 0.0
        self._computes = threading.get_ident()  # that computes
        self._events: list[Event] | None = None
        self._phase = ("", 0.0)

    @property
    def phase(self) -> str:
        """The phase that runs now, while events are recorded."""
        return self._phase[0]

    def record(self) -> None:
        """Record events from now on."""
        self._events, self._phase = [], ("", time.perf_counter())

    def recorded(self) -> list[Event]:
        """The events since ``record``, in order of their beginning; no more are recorded."""
        self.begin("")
        events, self._events = self._events or [], None
        return sorted(events, key=lambda event: event.start_s)

    def begin(self, phase: str) -> None:
        """A phase begins, and with it the one before ends; ``""`` is what belongs to none."""
        if self._events is not None:
            (before, start), now = self._phase, time.perf_counter()
            self._events.append(Event(before, start, now))
            self._phase = (phase, now)

    @contextmanager
    def commits(self) -> Iterator[None]:
        """Around what keeps a step, on the thread that computes."""
        start, stalled_s = time.perf_counter(), self.stalled_s
        try:
            yield
        finally:
            self.committing_s += time.perf_counter() - start - (self.stalled_s - stalled_s)

    def moves(self, what: str, call: Callable[..., None]) -> Callable[..., None]:
        """What a thread is to do: the time that it takes is counted, and recorded."""
        events = self._events

        def timed(*args: Any) -> None:
            start = time.perf_counter()
            with self._lock:
                self._active += 1
                if self._active == 1:
                    self._since = start
            try:
                call(*args)
            finally:
                end = time.perf_counter()
                with self._lock:
                    self._active -= 1
                    if not self._active:
                        self.moving_s += end - self._since
                if events is not None:
                    events.append(Event(what, start, end))

        return timed

    def wait(self, pieces: Iterable[Future[None]]) -> None:
        """Until pieces are done; a wait of the thread that computes is counted."""
        pending = [piece for piece in pieces if not piece.done()]
        if not pending:
            return
        start = time.perf_counter()
        wait(pending)
        if threading.get_ident() == self._computes:
            end = time.perf_counter()
            self.stalled_s += end - start
            if self._events is not None:
                self._events.append(Event(STALL, start, end))
