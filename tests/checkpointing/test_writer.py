import threading
from dataclasses import dataclass, field
from typing import Any

import pytest

from lightning_align.checkpointing.writer import Writer


@dataclass(eq=False)
class Task:
    log: list[Any]
    name: str
    action: Any = lambda: None
    errors: list[BaseException] = field(default_factory=list)

    def run(self) -> None:
        self.action()
        self.log.append(self.name)

    def failed(self, error: BaseException) -> None:
        self.errors.append(error)


def test_jobs_run_in_order_and_are_waited_for() -> None:
    writer, log = Writer("t"), []
    for name in "abc":
        writer.submit(Task(log, name))

    assert writer.wait(timeout_s=10)
    assert log == ["a", "b", "c"]
    writer.close()


def test_a_job_that_fails_does_not_stop_the_next() -> None:
    def fail() -> None:
        raise OSError("full")

    writer, log = Writer("t"), []
    bad = Task(log, "bad", fail)
    writer.submit(bad)
    writer.submit(Task(log, "good"))

    assert writer.wait(timeout_s=10)
    assert log == ["good"]
    assert str(bad.errors[0]) == "full"


def test_waiting_ends_at_the_deadline() -> None:
    gate, log = threading.Event(), []
    writer = Writer("t")
    writer.submit(Task(log, "slow", gate.wait))

    assert not writer.wait(timeout_s=0.05)
    gate.set()
    assert writer.wait(timeout_s=10)


def test_only_jobs_that_wait_are_cancelled() -> None:
    begun, gate, log = threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        gate.wait()

    writer = Writer("t")
    writer.submit(Task(log, "at work", slow))
    assert begun.wait(10)
    writer.submit(Task(log, "queued"))
    writer.submit(Task(log, "kept"))

    cancelled = writer.cancel(lambda job: job.name != "kept")  # type: ignore[attr-defined]

    gate.set()
    assert writer.wait(timeout_s=10)
    assert [job.name for job in cancelled] == ["queued"]  # type: ignore[attr-defined]
    assert log == ["at work", "kept"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_died_is_started_again() -> None:
    def die() -> None:
        raise SystemExit

    writer, log = Writer("t"), []
    lost = Task(log, "lost", die)
    writer.submit(lost)
    assert writer._thread is not None
    writer._thread.join(10)

    with pytest.warns(UserWarning, match="thread that writes checkpoints died"):
        writer.submit(Task(log, "next"))

    assert writer.wait(timeout_s=10)
    assert log == ["next"]
    assert str(lost.errors[0]) == "the writing thread died"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_died_does_not_hang_whoever_waits() -> None:
    def die() -> None:
        raise SystemExit

    writer, log = Writer("t"), []
    writer.submit(Task(log, "lost", die))

    with pytest.warns(UserWarning, match="died"):
        assert writer.wait(timeout_s=10)
