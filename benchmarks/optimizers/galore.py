"""GaLoreAdamW against galore-torch: step, refresh, stalls, state, and how good the projection is.

    python benchmarks/optimizers/galore.py           # about five minutes on one core
    python benchmarks/optimizers/galore.py --quick   # one layer instead of four, three repeats

Needs the extra `peer`. Times are CPU time (``process_time``) on one thread; both sides take turns
in one process after a warm-up, with the same gradients. Four layers of (512, 512), (1376, 512),
(512, 1376), rank 128, gap 200, fp32.

* ordinary: a step without a refresh. Bar: 1.15 times faster.
* refresh: a step in which all matrices are refreshed, warm. Bar: 10 times faster.
* stall: the worst of 200 steps over their median, the gap once around, the cold first step apart.
  Bar: at most 1.6.
* state: bytes of all storages that the state keeps alive, at the shapes of the 7B Llama divided by
  16, against the paper's formula and AdamW. Bars: 1.02 times the formula, 0.65 less than AdamW.
* energy: share of the squared norm of the gradient, of what the best projection of that rank
  keeps. Once for drifting matrices with singular values k^-0.7, once for the gradients of a small
  Llama in training. Bar: 0.99.
"""

from __future__ import annotations

import argparse
import lzma
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from galore_torch import GaLoreAdamW as GaLoreTorch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1]))

from hardware import hardware

from lightning_align.data.corpora import embedded_path
from lightning_align.optimizers.galore import GaLoreAdamW
from lightning_align.optimizers.projection import Basis, captured_energy, refreshed, sides

RANK, GAP, SCALE = 128, 200, 0.25
LAYER = [(512, 512), (1376, 512), (512, 1376)]
SIDES = ("galore-torch", "ours")
BARS = {"ordinary": 1.15, "refresh": 10.0, "stall": 1.6, "formula": 1.02, "less": 0.65}
ENERGY_BAR = 0.99


def optimizer(side: str, parameters: list[nn.Parameter], rank: int, gap: int) -> Any:
    group = {"params": parameters, "rank": rank, "update_proj_gap": gap, "scale": SCALE}
    if side == "ours":
        return GaLoreAdamW([group], lr=1e-3)
    return GaLoreTorch([{**group, "proj_type": "std"}], lr=1e-3, no_deprecation_warning=True)


def weights(shapes: list[tuple[int, int]]) -> list[nn.Parameter]:
    """Small weights, each with a gradient."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02)) for shape in shapes]
    for weight in made:
        weight.grad = torch.randn(weight.shape, generator=generator)
    return made


def cpu_seconds(step: Callable[[], Any]) -> float:
    start_s = time.process_time()
    step()
    return time.process_time() - start_s


def measure_steps(
    shapes: list[tuple[int, int]], gap: int, steps: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of a step that is not the first: mean over ``steps``, for each repeat."""
    optimizers = {side: optimizer(side, weights(shapes), RANK, gap) for side in SIDES}
    for made in optimizers.values():
        made.step()  # cold
        made.step()
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side, made in optimizers.items():
            spent = [cpu_seconds(made.step) for _ in range(steps)]
            times[side].append(1e3 * statistics.fmean(spent))
    return times


def measure_stalls(
    shapes: list[tuple[int, int]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Worst over median of steps 1 to GAP, for each repeat; and the cold first step, in ms."""
    optimizers = {side: optimizer(side, weights(shapes), RANK, GAP) for side in SIDES}
    first = {side: 1e3 * cpu_seconds(made.step) for side, made in optimizers.items()}
    ratios: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side, made in optimizers.items():
            spent = [cpu_seconds(made.step) for _ in range(GAP)]
            ratios[side].append(max(spent) / statistics.median(spent))
    return ratios, first


def shapes_7b(divisor: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]], int]:
    """The 7B Llama's shapes and GaLore's rank, divided: those projected, and the others."""
    width, inner, vocabulary = 4096 // divisor, 11008 // divisor, 32000 // divisor
    attention = [(width, width)] * 4
    return (
        (attention + [(inner, width)] * 2 + [(width, inner)]) * 2,  # two layers of 32
        [(vocabulary * 2 // 32, width)] * 2,  # so that embedding and head keep their share
        1024 // divisor,
    )


def kept_bytes(state: Any) -> int:
    """Bytes of the distinct storages that are reachable from an optimizer's state."""
    storages: dict[int, int] = {}
    waiting, seen = [state], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)
        elif hasattr(item, "__dict__"):
            waiting.extend(vars(item).values())
    return sum(storages.values())


def measure_state(side: str) -> tuple[float, float]:
    """Bytes over the paper's formula, and what is saved of AdamW's, for the whole model."""
    shapes, others, rank = shapes_7b(16)
    made = optimizer(side, weights(shapes), rank, GAP)
    made.step()
    rest = 2 * 4 * sum(math.prod(shape) for shape in others)  # AdamW's two moments, fp32
    formula = 4 * sum(rank * min(shape) + 2 * rank * max(shape) for shape in shapes)
    adamw = 2 * 4 * sum(math.prod(shape) for shape in shapes)
    kept = kept_bytes(dict(made.state))
    return kept / formula, 1 - (kept + rest) / (adamw + rest)


def drifting(rows: int, cols: int, number: int) -> Iterator[Tensor]:
    """Matrices with singular values k^-0.7, whose singular vectors turn by acos 0.8 each time."""
    generator = torch.Generator().manual_seed(0)
    count = min(rows, cols)

    def vectors(size: int, old: Tensor | None) -> Tensor:
        noise = torch.randn(size, count, generator=generator) / math.sqrt(size)
        turned: Tensor = torch.linalg.qr(noise if old is None else 0.8 * old + 0.6 * noise)[0]
        return turned

    left = right = None
    for _ in range(number):
        left, right = vectors(rows, left), vectors(cols, right)
        yield (left * torch.arange(1, count + 1) ** -0.7) @ right.T


def llama_gradients(number: int, between: int) -> Iterator[list[Tensor]]:
    """Gradients of a small Llama's matrices, every few steps of training on a novel's bytes."""
    torch.manual_seed(0)
    with lzma.open(embedded_path("pride_and_prejudice")) as novel:
        tokens = torch.frombuffer(bytearray(novel.read()), dtype=torch.uint8).long()
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).train()
    matrices = [layer for layer in model.model.layers.modules() if isinstance(layer, nn.Linear)]
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in range(number * between):
        starts = torch.randint(len(tokens) - 129, (8,)).tolist()
        batch = torch.stack([tokens[start : start + 128] for start in starts])
        adamw.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        if step % between == 0:
            yield [matrix.weight.grad.clone() for matrix in matrices]
        adamw.step()


def shares(gradients: Iterator[Tensor], rank: int, projection: str) -> list[float]:
    """Energy kept by each refresh, of the best; the old basis's in its place for "stale"."""
    basis, found = Basis(), []
    for number, gradient in enumerate(gradients):
        projected = sides("std", *gradient.shape)
        best, _ = refreshed("svd", gradient, projected, rank, Basis(), number)
        if projection != "stale" or number == 0:
            name = "subspace" if projection == "stale" else projection
            basis, _ = refreshed(name, gradient, projected, rank, basis, number)
        found.append(captured_energy(gradient, basis) / captured_energy(gradient, best))
    return found[1:]  # the warm ones


def spread(values: list[float], unit: str = "") -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}] {unit}".rstrip()


def report_times(shapes: list[tuple[int, int]], repeats: int) -> None:
    for name, gap, steps in (("ordinary", 10**6, 5), ("refresh", 1, 1)):
        times = measure_steps(shapes, gap, steps, repeats)
        print(f"{name} step")
        for side in SIDES:
            print(f"  {side:12} {spread(times[side], 'ms CPU')}")
        ratio = statistics.median(times["galore-torch"]) / statistics.median(times["ours"])
        print(f"  ratio        {ratio:.2f}x (bar {BARS[name]}x)\n", flush=True)
    ratios, first = measure_stalls(shapes, repeats)
    print("stall: worst of 200 steps over their median")
    for side in SIDES:
        print(f"  {side:12} {spread(ratios[side])}; cold first step {first[side]:.0f} ms CPU")
    print(f"  ratio        {statistics.median(ratios['ours']):.2f} (bar {BARS['stall']})\n")


def report_state() -> None:
    print("state at the 7B shapes over 16, rank 64")
    for side in SIDES:
        formula, less = measure_state(side)
        print(f"  {side:12} {formula:.3f}x the formula, {less:.3f} less than AdamW")
    print(f"  bars         {BARS['formula']}x, {BARS['less']}\n", flush=True)


def report_energy(number: int) -> None:
    print(f"energy of the best projection's, over {number - 1} warm refreshes")
    projections = ("subspace", "randomized", "random", "stale")
    drift = {shape: list(drifting(*shape, number)) for shape in LAYER}
    llama = list(zip(*llama_gradients(number, between=20), strict=True))
    for title, matrices, rank in (
        ("spectrum k^-0.7, rank 128", list(drift.values()), RANK),
        ("small Llama in training, rank 32", llama, 32),
    ):
        print(f"  {title}")
        for projection in projections:
            found = [share for each in matrices for share in shares(iter(each), rank, projection)]
            bar = f" (bar {ENERGY_BAR})" if projection == "subspace" else ""
            print(f"    {projection:10} {spread(found)}{bar}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one layer, three repeats")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layers, repeats = (1, 3) if arguments.quick else (4, 7)
    print(f"command: python {' '.join(sys.argv)}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, {time.strftime('%F')}")
    print(f"hardware: {hardware()}")
    print(f"{layers} layers, {repeats} alternated repeats: median [min, max]\n")
    report_times(LAYER * layers, repeats)
    report_state()
    report_energy(4 if arguments.quick else 6)


if __name__ == "__main__":
    main()
