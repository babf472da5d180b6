import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_align.checkpointing import memory
from lightning_align.checkpointing.memory import LARGE_BYTES, Copies


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_every_byte_is_copied_once(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes around every limit: small, large, and more than a thread's chunk."""
    monkeypatch.setattr(memory, "_idle_cores", lambda: 4)
    sizes = [1, 63, LARGE_BYTES - 1, LARGE_BYTES, 5 << 20, (9 << 20) + 1]
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    targets = [torch.zeros(size + 1, dtype=torch.uint8) for size in sizes]
    pieces = [
        (to.data_ptr(), source.data_ptr(), size)
        for to, source, size in zip(targets, sources, sizes, strict=True)
    ]

    Copies(pieces, num_threads).run()

    for to, source in zip(targets, sources, strict=True):
        assert torch.equal(to[:-1], source)
        assert to[-1] == 0


def test_a_helper_that_does_not_get_to_run_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(gate.wait, 20)
        monkeypatch.setattr(memory, "_pool", lambda: pool)
        monkeypatch.setattr(memory, "_idle_cores", lambda: 4)
        source = torch.ones(20 << 20, dtype=torch.uint8)
        target = torch.zeros_like(source)

        Copies([(target.data_ptr(), source.data_ptr(), source.nbytes)], num_threads=3).run()

        assert not other.done()
        gate.set()
        assert bool(target.all())


def test_helpers_run_on_idle_cores_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def pool() -> ThreadPoolExecutor:
        nonlocal asked
        asked += 1
        return ThreadPoolExecutor(1)

    monkeypatch.setattr(memory, "_pool", pool)
    source = torch.ones(10 << 20, dtype=torch.uint8)
    target = torch.zeros_like(source)
    copies = Copies([(target.data_ptr(), source.data_ptr(), source.nbytes)], num_threads=4)
    for idle in (0, 2, 9):
        monkeypatch.setattr(memory, "_idle_cores", lambda idle=idle: idle)
        target.zero_()
        copies.run()
        assert bool(target.all())
    assert asked == 0 + 2 + 3


def test_idle_cores_are_those_that_nothing_runs_on() -> None:
    assert 0 <= memory._idle_cores() <= memory._num_cores()


def test_a_forked_process_copies_with_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_idle_cores", lambda: 4)
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    source, target = (
        torch.ones(10 << 20, dtype=torch.uint8),
        torch.zeros(10 << 20, dtype=torch.uint8),
    )
    copies = Copies([(target.data_ptr(), source.data_ptr(), source.nbytes)], num_threads=2)
    copies.run()
    target.zero_()
    pid = os.fork()
    if pid == 0:
        copies.run()
        os._exit(0 if bool(target.all()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
