"""Waits are counted where something computes, and a step can be looked at piece by piece."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

import pytest
import torch

from lightning_align.offload import traffic as module
from lightning_align.offload.traffic import Traffic
from tests.offload.test_engine import network, offloaded, train


@pytest.fixture
def gate(monkeypatch):
    """Opens when somebody begins to wait."""
    event = threading.Event()

    def opens(pieces):
        event.set()
        return wait(pieces)

    monkeypatch.setattr(module, "wait", opens)
    return event


@pytest.mark.parametrize("elsewhere", [False, True])
def test_only_a_wait_of_the_thread_that_computes_is_a_stall(gate, elsewhere):
    traffic = Traffic()
    with ThreadPoolExecutor(1) as executor, ThreadPoolExecutor(1) as other:
        piece = executor.submit(gate.wait)
        if elsewhere:
            other.submit(traffic.wait, [piece]).result()
        else:
            traffic.wait([piece])
        assert piece.done()
        assert (traffic.stalled_s == 0) is elsewhere
        before = traffic.stalled_s
        traffic.wait([piece])  # there is nothing to wait for
        assert traffic.stalled_s == before


def test_time_in_which_several_things_move_counts_once(monkeypatch):
    """By the clock, one is there from 0 to 4, another from 1 to 3, a third from 6 to 8."""
    traffic, clock = Traffic(), iter([0.0, 1.0, 3.0, 4.0, 6.0, 8.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    second = traffic.moves("read", lambda: None)
    traffic.moves("read", second)()
    second()
    assert traffic.moving_s == 4 + 2


def test_a_commit_takes_what_it_does_not_wait(monkeypatch):
    """10 s, of which 3 are a stall; those before it are none of its."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    traffic = Traffic()
    traffic.stalled_s = 5.0
    with traffic.commits():
        now[0], traffic.stalled_s = 10.0, 8.0
    assert traffic.committing_s == 7


@pytest.mark.parametrize("early", [True, False])
def test_events_of_a_step_are_its_phases_and_what_was_moved(tmp_path, early):
    ours = network()
    engine = offloaded(tmp_path, ours)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1)
    engine.optimize_with(optimizer, fresh=True)
    train(ours, optimizer, engine, early, steps=1)
    engine.store.commit(1, b"")
    traffic = engine.threads.traffic
    traffic.record()
    train(ours, optimizer, engine, early, steps=1, window=1)
    engine.store.commit(2, b"")
    events = traffic.recorded()
    phases = [e for e in events if e.what in ("forward", "backward", "update", "commit")]
    assert [e.what for e in phases] == ["forward", "backward", "update", "commit"]
    assert all(a.end_s == b.start_s for a, b in pairwise(phases))
    assert all(e.start_s <= e.end_s for e in events)
    counts = {what: sum(e.what == what for e in events) for what in ("read", "write", "sync")}
    blocks = len(engine.blocks)
    writes = blocks * 2 + (0 if early else blocks)  # parameters, states of all four; gradients
    assert (counts["write"], counts["sync"]) == (writes, blocks)
    assert counts["read"] >= blocks * 2
    train(ours, optimizer, engine, early, steps=1)
    assert traffic.recorded() == []  # nobody asked
    engine.close()
