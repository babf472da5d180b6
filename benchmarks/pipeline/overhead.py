"""Claim: a step under PipelineStrategy takes as long as one of torch.distributed.pipelining itself.

Both run in the same two gloo processes, on the same stages and micro-batches, step by step in turn:
Lightning's whole loop with a logged loss against ``schedule.step`` and ``optimizer.step``. At least
0.95 of torch's throughput under 1F1B and 0.93 interleaved (median of the pairs, 95 % interval).
CPU time of rank 0 is told besides: with layers that take none (``--width 16``) it is what a step
costs more than torch's, also on a busy machine.

    python benchmarks/pipeline/overhead.py [--pairs 40] [--rows 256] [--width 512] [--schedule 1F1B]
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2]))  # tests.helpers: forked ranks

from lightning_align import PipelineStrategy
from tests.helpers.ranks import run_ranks
from tests.helpers.raw_pipeline import Alternate, Logged, RawPipeline, fit

LAYERS, RANKS, MICROBATCHES, WARMUP = 8, 2, 4, 3
BARS = {"1F1B": 0.95, "Interleaved1F1B": 0.93}


def layers(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
            )
            for _ in range(LAYERS)
        )
    )


Pairs = list[tuple[float, float]]


def run(rank: int, schedule: str, pairs: int, rows: int, width: int) -> tuple[Pairs, Pairs]:
    net = list(layers(width))
    num_stages = RANKS * (2 if schedule == "Interleaved1F1B" else 1)
    size = LAYERS // num_stages
    stages = [nn.Sequential(*net[index * size :][:size]) for index in range(num_stages)]
    raw = RawPipeline(schedule, stages, rank, RANKS, MICROBATCHES, torch.optim.AdamW)
    alternate = Alternate(raw)
    batch = [torch.randn(rows, width) for _ in range(2)]
    module = Logged(layers(width), torch.optim.AdamW)
    strategy = PipelineStrategy(schedule, num_microbatches=MICROBATCHES)
    fit(module, strategy, rank, RANKS, [batch] * (pairs + WARMUP), alternate)
    return alternate.pairs[WARMUP:], alternate.cpu[WARMUP:]


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the median, by order statistics."""
    ordered = sorted(values)
    reach = 0.98 * math.sqrt(len(ordered))
    low = max(0, math.floor(len(ordered) / 2 - reach))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach))
    return ordered[low], ordered[high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--schedule", nargs="+", default=list(BARS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stack = f"{LAYERS} layers of width {arguments.width}, {MICROBATCHES} micro-batches"
    print(f"{RANKS} gloo processes, {stack}")
    for schedule in arguments.schedule:
        sizes = arguments.pairs, arguments.rows, arguments.width
        pairs, cpu = run_ranks(
            lambda rank, name=schedule, sizes=sizes: run(rank, name, *sizes),
            RANKS,
            timeout_s=1200,
        )[0]
        ours, theirs = zip(*pairs, strict=True)
        ratios = [raw / lightning for lightning, raw in pairs]
        low, high = interval(ratios)
        print(
            f"{schedule:<16} ours {statistics.median(ours) * 1e3:7.1f} ms "
            f"(min {min(ours) * 1e3:.1f}), torch {statistics.median(theirs) * 1e3:7.1f} ms "
            f"(min {min(theirs) * 1e3:.1f}), throughput ratio {statistics.median(ratios):.3f} "
            f"[{low:.3f}, {high:.3f}] (bar {BARS[schedule]})"
        )
        more = [(lightning - raw) * 1e3 for lightning, raw in cpu]
        low, high = interval(more)
        print(f"  CPU time of a step {statistics.median(more):.2f} ms more [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
