"""A step of Muon against torch.optim.Muon on the matrices of a transformer: time and agreement.

    python benchmarks/optimizers/muon.py            # about two minutes on one core
    python benchmarks/optimizers/muon.py --quick    # one layer, three repeats

Time is CPU time (``process_time``) of ``step()`` on one thread, all sides alternating in one
process after a warm-up. torch's Muon iterates in bf16, which a CPU without bf16 instructions does
very slowly; so the peer is torch's own class with that one cast taken out, and the class as shipped
is timed once, on one matrix, as a footnote. Bar: at least 1.8x faster than the patched peer.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import _muon

sys.path.append(str(Path(__file__).parents[1]))

from hardware import hardware

from lightning_align import Muon

LAYER = [(512, 512), (1376, 512), (512, 1376)]
LAYERS, REPEATS = 4, 7
SPEED_BAR = 1.8
LR = 0.02

as_shipped = _muon._zeropower_via_newtonschulz


class StaysWide(Tensor):
    """Ignores the cast at the head of torch's function; all other arithmetic stays torch's."""

    def bfloat16(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor).clone()  # type: ignore[no-any-return]


def in_fp32(gradient: Tensor, *arguments: Any) -> Tensor:
    return as_shipped(gradient.as_subclass(StaysWide), *arguments)  # type: ignore[arg-type]


SIDES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "torch fp32": lambda parameters: torch.optim.Muon(parameters, lr=LR),
    "newton_schulz": lambda parameters: Muon(parameters, lr=LR, backend="newton_schulz"),
    "auto": lambda parameters: Muon(parameters, lr=LR),
}


def matrices(shapes: list[tuple[int, int]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    """Rank 16 and noise, as gradients are: a flat spectrum would flatter eigenvalues."""
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        rows, columns = parameter.shape
        left = torch.randn(rows, 16, generator=generator)
        right = torch.randn(16, columns, generator=generator)
        noise = torch.randn(rows, columns, generator=generator)
        parameter.grad = left @ right / 4 + 0.1 * noise


def cpu_seconds(optimizer: torch.optim.Optimizer) -> float:
    start_s = time.process_time()
    optimizer.step()
    return time.process_time() - start_s


def measure(layers: int, repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """CPU seconds of each step by side, and how far each side is from the peer in the end."""
    _muon._zeropower_via_newtonschulz = in_fp32
    sides = {name: matrices(LAYER * layers) for name in SIDES}
    start = matrices(LAYER * layers)
    optimizers = {name: build(sides[name]) for name, build in SIDES.items()}
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for repeat in range(repeats + 1):
        for name, optimizer in optimizers.items():
            set_gradients(sides[name], repeat)
            seconds = cpu_seconds(optimizer)
            if repeat > 0:  # The first round is the warm-up.
                times[name].append(seconds)
    peer = sides["torch fp32"]
    moved = distance(peer, start)
    return times, {name: distance(sides[name], peer) / moved for name in SIDES}


def distance(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> float:
    with torch.no_grad():
        return sum((a - b).square().sum().item() for a, b in zip(ours, theirs, strict=True)) ** 0.5


def measure_as_shipped() -> float:
    """Wall seconds of one step of torch's Muon in bf16, on one 512 x 512 matrix."""
    _muon._zeropower_via_newtonschulz = as_shipped
    parameters = matrices(LAYER[:1])
    set_gradients(parameters, 0)
    optimizer = torch.optim.Muon(parameters, lr=LR)
    start_s = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start_s


def spread(values: list[float]) -> str:
    milliseconds = [1000 * value for value in values]
    middle, low, high = statistics.median(milliseconds), min(milliseconds), max(milliseconds)
    return f"{middle:7.1f} [{low:.1f}, {high:.1f}] ms CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one layer, three repeats")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layers, repeats = (1, 3) if arguments.quick else (LAYERS, REPEATS)
    print(f"command: python {' '.join(sys.argv)}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, {time.strftime('%F')}")
    print(f"hardware: {hardware()}")
    print(f"{layers} x {LAYER}, fp32, {repeats} alternated repeats: median [min, max]\n")
    times, distances = measure(layers, repeats)
    for name, values in times.items():
        print(f"  {name:14} {spread(values)}, {distances[name]:.1e} of the way from the peer")
    seconds = measure_as_shipped()
    print(f"  torch as shipped (bf16): {seconds:.2f} s wall for one 512 x 512 matrix, one step")
    peer = statistics.median(times["torch fp32"])
    for name in ("newton_schulz", "auto"):
        ratio = peer / statistics.median(times[name])
        bar = f" (bar {SPEED_BAR}x)" if name == "auto" else ""
        print(f"  {name} is {ratio:.2f}x as fast as torch's in fp32{bar}")


if __name__ == "__main__":
    main()
