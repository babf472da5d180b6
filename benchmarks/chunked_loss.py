"""The chunked cross-entropy against full logits and ``F.cross_entropy``: time and memory.

    python benchmarks/chunked_loss.py            # everything, about ten minutes on one core
    python benchmarks/chunked_loss.py --quick    # one shape, three repeats

Time is CPU time (``process_time``) of forward and backward on one thread, both sides alternating in
one process after a warm-up. Memory is the peak resident set above what imports, inputs and a small
warm-up take, one fresh process for each side; the gradients of hidden states and weight are part of
it on both sides. Bars: time at most 1.1x, memory at most 0.3x.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from hardware import hardware
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_align.layers import Head
from lightning_align.losses import linear_cross_entropy

VOCAB_SIZE = 32_000
TOKENS = 512
SHAPES = [(1, 256), (1, 576), (4, 256), (4, 576)]  # batch size, hidden size
TIME_BAR, MEMORY_BAR = 1.1, 0.3


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, Head(weight), labels).loss


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "full": full_logits,
    "chunked": chunked,
}


def inputs(batch_size: int, hidden_size: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, D), weight (V, D), labels (N,), the first two requiring gradients."""
    generator = torch.Generator().manual_seed(0)
    rows = batch_size * TOKENS
    hidden = torch.randn(rows, hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, generator=generator).mul_(0.02).requires_grad_()
    return hidden, weight, torch.randint(vocab_size, (rows,), generator=generator)


def cpu_seconds(side: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> float:
    """CPU time of one forward and backward."""
    hidden.grad = weight.grad = None
    gc.collect()
    start_s = time.process_time()
    SIDES[side](hidden, weight, labels).backward()  # type: ignore[no-untyped-call]
    return time.process_time() - start_s


def measure_time(batch_size: int, hidden_size: int, repeats: int) -> dict[str, list[float]]:
    tensors = inputs(batch_size, hidden_size, VOCAB_SIZE)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for repeat in range(repeats + 1):
        for side in SIDES:
            seconds = cpu_seconds(side, *tensors)
            if repeat > 0:  # The first round is the warm-up.
                times[side].append(seconds)
    return times


def peak_bytes() -> int:
    """Peak resident set. On Linux of this program alone: ru_maxrss survives exec."""
    try:
        with open("/proc/self/status") as lines:
            kilobytes = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    except OSError:
        kilobytes = str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return int(kilobytes) * 1024


def measure_memory_here(side: str, batch_size: int, hidden_size: int) -> float:
    """Peak above base of one step, in MB. Only meaningful in a fresh process."""
    cpu_seconds(side, *inputs(1, hidden_size, 500))
    tensors = inputs(batch_size, hidden_size, VOCAB_SIZE)
    base = peak_bytes()
    cpu_seconds(side, *tensors)
    return (peak_bytes() - base) / 1e6


def measure_memory(side: str, batch_size: int, hidden_size: int) -> float:
    arguments = ["--memory-of", side, str(batch_size), str(hidden_size)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout))


def spread(values: list[float], unit: str) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}] {unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, three repeats")
    parser.add_argument("--memory-of", nargs=3, metavar=("SIDE", "BATCH", "HIDDEN"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        side, batch_size, hidden_size = arguments.memory_of
        print(json.dumps(measure_memory_here(side, int(batch_size), int(hidden_size))))
        return

    shapes, repeats = (SHAPES[:1], 3) if arguments.quick else (SHAPES, 7)
    print(f"command: python {' '.join(sys.argv)}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, {time.strftime('%F')}")
    print(f"hardware: {hardware()}")
    print(f"V={VOCAB_SIZE}, T={TOKENS}, fp32, {repeats} alternated repeats: median [min, max]\n")
    for batch_size, hidden_size in shapes:
        times = measure_time(batch_size, hidden_size, repeats)
        memory = {side: measure_memory(side, batch_size, hidden_size) for side in SIDES}
        time_ratio = statistics.median(times["chunked"]) / statistics.median(times["full"])
        memory_ratio = memory["chunked"] / memory["full"]
        print(f"B={batch_size} ({batch_size * TOKENS} rows), D={hidden_size}")
        for side in SIDES:
            print(f"  {side:8} {spread(times[side], 's CPU')}, {memory[side]:.0f} MB above base")
        print(
            f"  ratio    time {time_ratio:.2f}x (bar {TIME_BAR}x), "
            f"memory {memory_ratio:.2f}x (bar {MEMORY_BAR}x)",
            flush=True,
        )


if __name__ == "__main__":
    main()
