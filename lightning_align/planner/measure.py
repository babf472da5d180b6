"""Measuring a machine: how long operations of each class take, by how much they have to do.

A curve of each class is measured on tensors from a few kilobytes to more than the caches hold, and
a small model's step for what Python and autograd add to an operation. Nothing is fitted to steps
that are predicted later.
"""

from __future__ import annotations

import math
import mmap
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_align._compat.glibc_memory import NEVER_KEPT, give_back_freed, mapped_from
from lightning_align._errors import argument_error
from lightning_align.offload import tuning
from lightning_align.planner.call_costs import call_costs
from lightning_align.planner.checkpoint_costs import checkpoint_costs, recomputed_seconds
from lightning_align.planner.curves import (
    FUNCTIONS,
    MOVE,
    TANH,
    Curve,
    class_of,
    interpolated,
    work_of,
)
from lightning_align.planner.few_rows import FewRows, call_without_autograd, few_rows
from lightning_align.planner.module_scopes import FORWARD
from lightning_align.planner.op_flops import ATTENTION, NORM, POINTWISE, PRODUCT, REDUCTION
from lightning_align.planner.records import Record
from lightning_align.planner.report import StepReport

WHERE = "MachineBalance.measure"
SAMPLES, SAMPLE_S = 5, 0.012  # of which the median counts; seconds of each
# Of one operation: what all its calls take together, at least two, and what a larger size may take.
# Processors without 16-bit units multiply hundreds of times slower in bf16 than in fp32.
MOST_S, LONGEST_S = 0.2, 0.1
ROWS = (1, 32, 256, 2048, 16_384)  # of 256 elements
PRODUCTS, TALL = (8, 32, 64, 128, 256, 512), 4  # n, of a product of (TALL n, n) and (n, n)
TOKENS, WIDTHS, ROWS_OF_HEADS = (8, 32, 128, 512), (16, 64), 16  # of attention
# Calls take turns on tensors of as many bytes in all, and results stay as long: in a step, too,
# what an operation reads and writes is not where the last one of its kind has left it. It is more
# than a core has of caches, of which some processors share hundreds of megabytes.
TURNS_BYTES, MOST_TURNS = 96 << 20, 256
CACHED_ROWS, STREAM_ROWS = 256, 65_536  # of three vectors
DRAWN = 1 << 18  # random numbers, which larger tensors repeat
FRESH_BYTES = NEVER_KEPT


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median, and the shortest and longest that there was."""

    seconds: float
    low: float
    high: float


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock for what a device does, in seconds."""
    if device.type != "cpu":

        def synchronized() -> float:
            torch.accelerator.synchronize(device)
            return time.perf_counter()

        return synchronized
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def timed(
    run: Callable[..., object], clock: Callable[[], float], inputs: Sequence[Any] = ((),)
) -> Timing:
    """Seconds of a call, over as many as are long enough for the clock.

    Args:
        run: Called again and again.
        clock: Seconds.
        inputs: Its arguments, in turns.
    """
    results: deque[object] = deque(maxlen=len(inputs))
    turns = cycle(inputs)
    begin = clock()
    for _ in inputs:
        start = clock()
        results.append(run(*next(turns)))
        if clock() - begin > MOST_S:  # what is as slow is not faster the next time
            break
    else:
        start = clock()
        results.append(run(*next(turns)))
    calls = max(1, int(SAMPLE_S / max(clock() - start, 1e-7)))
    found: list[float] = []
    while len(found) < SAMPLES and not (found and clock() - begin > MOST_S):
        start = clock()
        for given in islice(turns, calls):
            results.append(run(*given))
        found.append((clock() - start) / calls)
    return Timing(median(found), min(found), max(found))


def within_reach(work: float, points: Sequence[tuple[float, float]]) -> bool:
    """Whether a call of some work is short enough to be measured, by the points before it.

    Two points are always measured, as many as a curve needs.

    Args:
        work: Of the call.
        points: Work and seconds, the largest last.
    """
    if len(points) < 2:
        return True
    last_work, seconds = points[-1]
    return seconds * work / last_work <= LONGEST_S


def in_turns(*shapes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Any]:
    """Tensors of these shapes, as often as calls take turns on them.

    Args:
        *shapes: Of the arguments of a call.
        device: Where they are.
        dtype: Of them.
    """
    nbytes = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    turns = min(max(TURNS_BYTES // nbytes, 1), MOST_TURNS)
    generator = torch.Generator(device).manual_seed(0)  # those of a run stay as they are
    return [[_random(shape, generator, dtype) for shape in shapes] for _ in range(turns)]


def _random(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    size = math.prod(shape)
    drawn = torch.randn(min(size, DRAWN), generator=generator, device=generator.device, dtype=dtype)
    return drawn.repeat(-(-size // len(drawn)))[:size].view(shape).contiguous()


def measured(
    device: str | torch.device, dtype: torch.dtype, disk: str | Path | None
) -> dict[str, Any]:
    """What a ``MachineBalance`` is made of.

    Args:
        device: Which one.
        dtype: Of all that is computed.
        disk: Folder on a drive, or None.

    Raises:
        ValueError: If there is no such device, or it does not compute with that dtype.
    """
    place = _usable(device, dtype)
    clock = clock_of(place)
    with torch.no_grad():
        products = _products(place, dtype, clock)
        attention, softmax = _attention(place, dtype, clock)
        curves = {**_curves(place, dtype, clock), **attention}
        streams = {rows: _stream(rows, place, dtype, clock) for rows in (CACHED_ROWS, STREAM_ROWS)}
    curves[PRODUCT] = [(2.0 * TALL * n**3, timing.seconds) for n, timing in products.items()]
    flops, peak = _fastest(products)
    cached, stream = streams.values()
    cached_bytes, stream_bytes = (3.0 * rows * 256 * dtype.itemsize for rows in streams)
    folder = None if disk is None else Path(disk)
    # Where smaller tensors are mapped, too, the curves have it.
    keeps = place.type == "cpu" and mapped_from() == NEVER_KEPT
    threads = f"cpu, {torch.get_num_threads()} threads"
    calls = _calls(curves, softmax, place, dtype, clock)
    if keeps:  # no more than before: a run goes on in this process
        give_back_freed(from_now_on=False)
    return {
        "name": threads if place.type == "cpu" else str(place),
        "peak_flops": flops / peak.seconds,
        "mem_bandwidth": stream_bytes / stream.seconds,
        "source": "measured",
        "dtype": str(dtype).removeprefix("torch."),
        "curves": curves,
        "softmax": softmax,
        **calls,
        "is_asynchronous": place.type != "cpu",
        "cache_bandwidth": cached_bytes / cached.seconds,
        "disk_bandwidth": None if folder is None else _disk(folder),
        "fresh_bandwidth": fresh_bandwidth(clock) if keeps else None,
        "intervals": {
            "peak_flops": (flops / peak.high, flops / peak.low),
            "mem_bandwidth": (stream_bytes / stream.high, stream_bytes / stream.low),
        },
    }


def _calls(
    curves: dict[str, Curve],
    softmax: dict[str, float],
    device: torch.device,
    dtype: torch.dtype,
    clock: Callable[[], float],
) -> dict[str, Any]:
    overheads = call_costs(curves, softmax, device, dtype, clock)
    if device.type != "cpu":  # which is busy while Python runs
        return {"overheads": overheads}

    def kernel(record: Record) -> float:
        return interpolated(curves[class_of(record)], work_of(record, softmax))

    def recomputed(report: StepReport) -> float:
        return recomputed_seconds(report, kernel, overheads[FORWARD])

    region, saved = checkpoint_costs(recomputed, device, dtype, clock)
    return {"overheads": overheads, "checkpoint_s": region, "checkpoint_saved_s": saved}


def few_rows_of(found: Mapping[torch.dtype, float], memory: float, cache: float) -> list[FewRows]:
    """What a processor reaches with few rows, of several dtypes.

    Args:
        found: Dtype -> FLOP/s of its products.
        memory: Bytes a second of a stream.
        cache: The same of what fits the caches.
    """
    place = torch.device("cpu")
    clock = clock_of(place)
    call_s = call_without_autograd(clock, cache)

    def shares(dtype: torch.dtype, peak: float) -> FewRows:
        def seconds(run: Callable[..., Any], shapes: list[tuple[int, ...]]) -> float:
            return timed(run, clock, in_turns(*shapes, device=place, dtype=dtype)).seconds

        return few_rows(seconds, peak, memory, dtype, call_s)

    with torch.inference_mode():
        return [shares(dtype, peak) for dtype, peak in found.items()]


def product_peak(device: str | torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of products, of the size for which there are most.

    Args:
        device: Which one.
        dtype: Of their inputs.

    Raises:
        ValueError: If there is no such device, or it does not compute with that dtype.
    """
    place = _usable(device, dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        flops, timing = _fastest(_products(place, dtype, clock_of(place)))
    return flops / timing.seconds


def _fastest(products: dict[int, Timing]) -> tuple[float, Timing]:
    """FLOPs and time of the product that has most of them a second."""
    size = min(products, key=lambda n: products[n].seconds / n**3)
    return 2.0 * TALL * size**3, products[size]


def _usable(device: str | torch.device, dtype: torch.dtype) -> torch.device:
    try:
        place = torch.device(device)
        one = torch.ones(2, 2, device=place, dtype=dtype)
        (one @ one).sum().item()
    except (RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
        rule = f"it does not compute with {dtype}: {str(error).splitlines()[0]}"
        raise argument_error(WHERE, "device", device, rule) from error
    return place


_LAYOUTS: tuple[tuple[Any, ...], ...] = (  # what runs, and shapes in units of n
    (lambda x, weight: x @ weight.t(), (TALL, 1), (1, 1)),
    (lambda gradient, weight: gradient @ weight, (TALL, 1), (1, 1)),
    (lambda gradient, x: gradient.t() @ x, (TALL, 1), (TALL, 1)),
)


def _products(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float]
) -> dict[int, Timing]:
    """More tokens than features, as forward and the two of backward have them laid out."""
    sizes = PRODUCTS if device.type == "cpu" else (*PRODUCTS, 4096)
    found: dict[int, Timing] = {}
    for n in sizes:
        if not within_reach(n**3, [(m**3, timing.seconds) for m, timing in found.items()]):
            break
        ways = []
        for run, *shapes in _LAYOUTS:
            sizes_n = [(rows * n, columns * n) for rows, columns in shapes]
            ways.append(timed(run, clock, in_turns(*sizes_n, device=device, dtype=dtype)))
        found[n] = Timing(
            *(sum(getattr(way, name) for way in ways) / 3 for name in ("seconds", "low", "high"))
        )
    return found


def _stream(
    rows: int, device: torch.device, dtype: torch.dtype, clock: Callable[[], float]
) -> Timing:
    """A sum of vectors into memory that is there already."""
    a, b, c = (torch.ones(rows, 256, device=device, dtype=dtype) for _ in range(3))
    return timed(lambda: torch.add(a, b, out=c), clock)


Run = Callable[[Tensor, Tensor], object]


def _curves(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float]
) -> dict[str, Curve]:
    """Class -> curve."""
    aten: Any = torch.ops.aten
    gain = torch.ones(256, device=device, dtype=dtype)
    # class -> what runs, tensors that it reads and writes
    classes: dict[str, tuple[Run, int]] = {
        POINTWISE: (torch.add, 3),
        FUNCTIONS: (lambda x, _: F.gelu(x), 2),
        TANH: (lambda x, _: x.tanh(), 2),
        REDUCTION: (lambda x, _: x.sum(0), 1),
        NORM: (lambda x, _: F.layer_norm(x, (256,), gain, gain), 2),
        f"{NORM} backward": (lambda x, y: aten._softmax_backward_data(x, y, -1, dtype), 3),
        MOVE: (lambda x, _: x.clone(), 2),
    }
    curves: dict[str, Curve] = {}
    for name, (run, tensors) in classes.items():
        points: list[tuple[float, float]] = []
        for rows in ROWS:
            if not within_reach(tensors * rows * 256 * dtype.itemsize, points):
                break
            inputs = in_turns((rows, 256), (rows, 256), device=device, dtype=dtype)
            timing = timed(run, clock, inputs)
            points.append((float(tensors * rows * 256 * dtype.itemsize), timing.seconds))
        curves[name] = points
    return curves


def _attention(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float]
) -> tuple[dict[str, Curve], dict[str, float]]:
    """Curves of fused attention and its backward, and what a FLOP of softmax is worth in each.

    What a pair of tokens takes grows with the width of a head, and is not zero for none: from two
    widths follows how much of it is softmax.
    """
    several: dict[int, tuple[float, float]] = {}
    for tokens in TOKENS:
        if not within_reach(tokens**2, [(n**2, sum(times)) for n, times in several.items()]):
            break
        several[tokens] = _attention_times(device, dtype, clock, tokens, WIDTHS[0])
    longest = max(several)
    narrow = several[longest]
    wide = _attention_times(device, dtype, clock, longest, WIDTHS[1])
    curves: dict[str, Curve] = {}
    softmax = {}
    for place, (name, products, functions) in enumerate(
        ((ATTENTION, 4, 5), (f"{ATTENTION} backward", 10, 6))
    ):
        # seconds = (products * width + functions * softmax) * pairs / rate, for both widths
        slope = (wide[place] - narrow[place]) / (WIDTHS[1] - WIDTHS[0])
        rest = narrow[place] / slope - WIDTHS[0] if slope > 0 else 0.0
        softmax[name] = min(max(0.0, rest), WIDTHS[1]) * products / functions
        pairs = [ROWS_OF_HEADS * tokens**2 for tokens in several]
        work = [n * (products * WIDTHS[0] + functions * softmax[name]) for n in pairs]
        curves[name] = [(w, t[place]) for w, t in zip(work, several.values(), strict=True)]
    return curves, softmax


def _attention_times(
    device: torch.device,
    dtype: torch.dtype,
    clock: Callable[[], float],
    tokens: int,
    width: int,
) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    shape = (4, ROWS_OF_HEADS // 4, tokens, width)
    query = _random(shape, torch.Generator(device).manual_seed(0), dtype).requires_grad_()

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(query, query, query, is_causal=True)

    with torch.enable_grad():
        mixed = attend()

    def backward() -> None:
        torch.autograd.grad(mixed, query, mixed, retain_graph=True)

    return timed(attend, clock).seconds, timed(backward, clock).seconds


def _disk(folder: Path) -> float | None:
    return tuning.measured(folder, [tuning.DEFAULT], "auto").bandwidth


def fresh_bandwidth(clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second of memory that is mapped, touched for the first time and given back.

    What writing the same memory takes that is there already is not in it.

    Args:
        clock: Seconds.
    """
    seconds = []
    for _ in range(SAMPLES):
        start = clock()
        pages = mmap.mmap(-1, FRESH_BYTES)  # by itself: the heap may have kept as much
        memory = torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
        touched = clock()
        memory.fill_(1)
        written = clock()
        del memory
        pages.close()
        seconds.append((touched - start) - (written - touched) + (clock() - written))
    return FRESH_BYTES / max(median(seconds), 1e-9)
