"""A thread that works through a queue, outlives its failures, and can be waited for."""

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Job(Protocol):
    """Something for the writer to do."""

    def run(self) -> None:
        """Do it."""

    def failed(self, error: BaseException) -> None:
        """Take note of why it was not done."""


Work = TypeVar("Work", bound=Job)


def attempt(job: Job) -> None:
    """Run a job, which hears of its failure."""
    try:
        job.run()
    except Exception as error:
        job.failed(error)


class Writer(Generic[Work]):
    """Runs jobs one after the other on a background thread.

    A thread that died is started again with the next job, with a warning.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: deque[Work] = deque()
        self._current: Work | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def busy(self) -> list[Work]:
        """Jobs that are not done, the one at work first."""
        with self._changed:
            return [*([self._current] if self._current else []), *self._jobs]

    def submit(self, job: Work) -> None:
        """Queue a job."""
        with self._changed:
            self._revive()
            self._jobs.append(job)
            self._changed.notify_all()

    def cancel(self, unwanted: Callable[[Work], bool]) -> list[Work]:
        """Take ``unwanted`` jobs that have not begun out of the queue, and return them."""
        with self._changed:
            cancelled = [job for job in self._jobs if unwanted(job)]
            self._jobs = deque(job for job in self._jobs if job not in cancelled)
            self._changed.notify_all()
        return cancelled

    def wait(self, done: Callable[[], bool] | None = None, timeout_s: float | None = None) -> bool:
        """Wait until something holds, by default that no job is left; whether it does.

        Args:
            done: What must hold; asked whenever a job has ended.
            timeout_s: Seconds to wait; ``None`` has no limit.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not (done() if done else not self._jobs and self._current is None):
                self._revive()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                # In slices, so that Ctrl-C and a dead thread are noticed.
                self._changed.wait(0.5 if left is None else min(left, 0.5))
        return True

    def close(self) -> None:
        """End the thread once its queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _revive(self) -> None:
        """Start the thread if there is work and it is not running."""
        if self._thread is not None and self._thread.is_alive():
            return
        if self._thread is not None:
            lost, self._current = self._current, None
            warnings.warn(
                "The thread that writes checkpoints died; it is started again.", stacklevel=4
            )
            if lost is not None:
                lost.failed(RuntimeError("the writing thread died"))
        # A daemon: a store that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    if self._closed:
                        return
                    self._changed.wait()
                self._current = self._jobs.popleft()
            attempt(self._current)
            with self._changed:
                self._current = None
                self._changed.notify_all()
