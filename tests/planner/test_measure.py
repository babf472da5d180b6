"""What a measurement consists of; never how fast a machine is."""

import resource
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from lightning_align._compat.glibc_memory import LARGE, NEVER_KEPT
from lightning_align.planner import MachineBalance, call_costs, checkpoint_costs, measure
from lightning_align.planner.measure import in_turns, timed


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is measured, on next to nothing."""
    monkeypatch.setattr(measure, "SAMPLE_S", 1e-5)
    monkeypatch.setattr(measure, "SAMPLES", 2)
    monkeypatch.setattr(call_costs, "STEPS", 2)
    monkeypatch.setattr(checkpoint_costs, "STEPS", 2)
    monkeypatch.setattr(measure, "ROWS", (1, 8, 16))
    monkeypatch.setattr(measure, "CACHED_ROWS", 8)
    monkeypatch.setattr(measure, "STREAM_ROWS", 16)
    monkeypatch.setattr(measure, "PRODUCTS", (8, 16))
    monkeypatch.setattr(measure, "TOKENS", (8, 16))
    monkeypatch.setattr(measure, "TURNS_BYTES", 1 << 16)
    monkeypatch.setattr(measure, "FRESH_BYTES", 1 << 16)
    monkeypatch.setattr(measure, "mapped_from", lambda: NEVER_KEPT)


def test_a_machine_is_measured(quick: None, tmp_path: Path) -> None:
    generator = torch.get_rng_state()
    balance = MachineBalance.measure("cpu", disk=tmp_path)
    assert torch.equal(torch.get_rng_state(), generator)
    assert (balance.dtype, balance.source, balance.is_asynchronous) == (
        "float32",
        "measured",
        False,
    )
    for figure in ("peak_flops", "mem_bandwidth"):
        low, high = balance.intervals[figure]
        assert 0 < low <= getattr(balance, figure) <= high
    assert balance.cache_bandwidth
    assert balance.disk_bandwidth
    assert balance.fresh_bandwidth
    assert balance.checkpoint_s + balance.checkpoint_saved_s > 0
    assert not list(tmp_path.iterdir())
    assert set(balance.overheads) == {None, "forward", "recompute", "backward", "optimizer"}
    assert {"product", "pointwise", "functions", "reduction", "norm", "norm backward"} | {
        "move",
        "tanh",
        "attention",
        "attention backward",
    } == set(balance.curves)
    for curve in balance.curves.values():
        assert [work for work, _ in curve] == sorted(work for work, _ in curve)
        assert all(seconds > 0 for _, seconds in curve)


def test_a_peak_is_of_the_fastest_product(quick: None) -> None:
    generator = torch.get_rng_state()
    assert measure.product_peak("cpu", torch.bfloat16) > 0
    assert torch.equal(torch.get_rng_state(), generator)
    slow, fast = (measure.Timing(seconds, seconds, seconds) for seconds in (1.0, 2.0))
    assert measure._fastest({8: slow, 16: fast}) == (2.0 * measure.TALL * 16**3, fast)


def _ticking(step: float) -> Iterator[float]:
    return (step * n for n in count())


def test_a_timing_is_of_one_call() -> None:
    """A clock that moves by a second each time it is looked at, over many calls."""
    clock, calls = _ticking(measure.SAMPLE_S / 7), count()
    timing = timed(lambda: next(calls), lambda: next(clock))
    assert next(calls) == 2 + 7 * measure.SAMPLES
    assert timing.seconds == pytest.approx(measure.SAMPLE_S / 49)
    assert timing.low <= timing.seconds <= timing.high


def test_what_is_slow_is_called_twice() -> None:
    """A call of a second, of which eighty would be made of a fast one's kind."""
    calls, now = count(), [0.0]

    def run() -> None:
        next(calls)
        now[0] += 1.0

    timing = timed(run, lambda: now[0], ((),) * 64)
    assert next(calls) == 2
    assert timing == measure.Timing(1.0, 1.0, 1.0)


def test_sizes_that_would_take_long_are_left_out(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call is longer than the two of each curve that there must be."""
    monkeypatch.setattr(measure, "PRODUCTS", (8, 16, 32))
    monkeypatch.setattr(measure, "TOKENS", (8, 16, 32))
    monkeypatch.setattr(measure, "LONGEST_S", 0.0)
    found = MachineBalance.measure("cpu")
    assert {len(curve) for curve in found.curves.values()} == {2}
    assert measure.within_reach(20.0, [(1.0, 1e-3), (10.0, 1e-2)]) is False
    monkeypatch.setattr(measure, "LONGEST_S", 0.1)
    assert measure.within_reach(20.0, [(1.0, 1e-3), (10.0, 1e-2)])


def test_fresh_memory_is_what_the_first_touch_costs_and_giving_it_back() -> None:
    """Of 1, 4, 5 and 7 s: three to touch it, less one to write it again, and two to free it."""
    times = iter([1.0, 4.0, 5.0, 7.0] * measure.SAMPLES)
    assert measure.fresh_bandwidth(lambda: next(times)) == measure.FRESH_BYTES / 4


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted by Linux")
def test_fresh_memory_is_none_that_the_heap_has_kept() -> None:
    """A heap whose top has room for it would give the same pages again, which are no new ones."""
    for _ in range(3):  # freed once, such pieces lie in the heap from then on
        kept = [torch.ones(2 << 20) for _ in range(12)]
        top = torch.ones(1 << 10)  # below which is a hole
        kept.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    measure.fresh_bandwidth()
    touched = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert len(top)
    assert touched >= measure.SAMPLES * measure.FRESH_BYTES // (2 << 20)  # in pages of 2 MB


def test_memory_that_is_mapped_anyway_is_in_the_curves(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "mapped_from", lambda: LARGE)
    assert MachineBalance.measure("cpu").fresh_bandwidth is None


def test_calls_take_turns_on_as_many_tensors_as_caches_do_not_hold() -> None:
    device, generator = torch.device("cpu"), torch.get_rng_state()
    small = in_turns((4, 4), device=device, dtype=torch.float32)
    assert len(small) == measure.MOST_TURNS
    large = in_turns((1024, 1024), (1024, 1024), device=device, dtype=torch.float32)
    assert len(large) == measure.TURNS_BYTES // (8 << 20)
    assert [tensor.shape for tensor in large[0]] == [(1024, 1024)] * 2
    assert torch.equal(torch.get_rng_state(), generator)  # a run draws what it would have drawn
    assert not torch.equal(large[0][0], large[0][1])


def test_memory_is_more_than_caches_hold() -> None:
    """Of a processor with 300 MB of them, 48 MB were read twice as fast as memory is."""
    assert 3 * measure.STREAM_ROWS * 256 * 4 == 192 << 20
    assert measure.TURNS_BYTES == 96 << 20
    assert measure.TURNS_BYTES // measure.MOST_TURNS <= 384 << 10  # smaller tensors stay in caches


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=rf"MachineBalance.measure\(device='{device}'\)"):
        MachineBalance.measure(device)


def test_a_dtype_that_does_not_multiply_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not compute with torch\.float8_e4m3fn"):
        MachineBalance.measure(dtype=torch.float8_e4m3fn)
