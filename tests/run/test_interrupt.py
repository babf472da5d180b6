import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from lightning_align.run.interrupt import DeferredInterrupt


@pytest.fixture
def interrupt() -> Iterator[DeferredInterrupt]:
    # Shells start background jobs with it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = DeferredInterrupt()
    interrupt.install()
    yield interrupt
    interrupt.uninstall()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_waits_for_the_end_of_the_batch(interrupt: DeferredInterrupt) -> None:
    press()
    with pytest.raises(KeyboardInterrupt):
        interrupt.release()
    interrupt.release()  # only once


def test_a_second_one_is_raised_at_once(interrupt: DeferredInterrupt) -> None:
    press()
    with pytest.raises(KeyboardInterrupt):
        press()


def test_where_nothing_is_worth_waiting_for_it_is_raised_at_once(
    interrupt: DeferredInterrupt,
) -> None:
    interrupt.release(defer=False)
    with pytest.raises(KeyboardInterrupt):
        press()


def test_one_process_defers_only_if_asked_and_shares_nothing(
    interrupt: DeferredInterrupt,
) -> None:
    interrupt.uninstall()
    trainer = SimpleNamespace(world_size=1)
    interrupt.start(trainer, defer=False)
    with pytest.raises(KeyboardInterrupt):
        press()
    interrupt.start(trainer, defer=True)
    press()
    with pytest.raises(KeyboardInterrupt):
        interrupt.stop_if_it_came(trainer)
    assert not interrupt.is_shared
