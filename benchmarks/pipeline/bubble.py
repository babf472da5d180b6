"""Claim: a pipeline waits no longer under PipelineStrategy than under torch alone.

The layers sleep, 50 ms forward and 100 ms backward of a rank for each micro-batch (half of that on
each of two stages): so waiting can be measured on a busy machine, and the milliseconds that Python
takes for a step weigh little. Lightning's whole loop and torch.distributed.pipelining, step by step
in turn in the same gloo processes. Bubble: (step - ideal) / ideal, where ideal is the sleep of a
rank; at most 0.03 apart (median of the pairs).

    python benchmarks/pipeline/bubble.py [--repeats 7] [--ranks 2 4] [--microbatches 4 8 16]
        [--small | --picture docs/images/pipeline_run.png]
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2]))  # tests.helpers: forked ranks, layers that sleep

from lightning_align import PipelineStrategy
from lightning_align.pipelining import simulate
from tests.helpers.ranks import run_ranks
from tests.helpers.raw_pipeline import Alternate, Logged, RawPipeline, fit
from tests.helpers.sleeping_pipeline import SleepingStage

FORWARD_S, BACKWARD_S = 0.050, 0.100  # of a rank, for one micro-batch
STAGES_PER_RANK = {"1F1B": 1, "Interleaved1F1B": 2}
WARMUP, BAR = 2, 0.03
SGD = partial(torch.optim.SGD, lr=0.01)

Steps = list[tuple[float, float]]  # seconds of ours, seconds of torch's


def layers(schedule: str, pp: int) -> list[SleepingStage]:
    """One for each stage."""
    v = STAGES_PER_RANK[schedule]
    return [SleepingStage(i, FORWARD_S / v, BACKWARD_S / v, []) for i in range(pp * v)]


def train(rank: int, schedule: str, pp: int, m: int, steps: int, *callbacks: Any) -> Any:
    """Train under the strategy, which is returned."""
    recorded = not callbacks  # what is timed records nothing
    strategy = PipelineStrategy(schedule, num_microbatches=m, record_timeline=recorded)
    module = Logged(nn.Sequential(*layers(schedule, pp)), SGD)
    batch = [torch.ones(m, 1), torch.zeros(m, 1)]
    fit(module, strategy, rank, pp, [batch] * steps, *callbacks)
    return strategy


def pairs_of_steps(rank: int, schedule: str, pp: int, m: int, repeats: int) -> Steps:
    """Seconds of ``repeats`` pairs of steps."""
    alternate = Alternate(RawPipeline(schedule, layers(schedule, pp), rank, pp, m, SGD))
    train(rank, schedule, pp, m, repeats + WARMUP, alternate)
    return alternate.pairs[WARMUP:]


def draw(path: Path, schedule: str = "Interleaved1F1B", pp: int = 4, m: int = 8) -> None:
    """A real step below the one that is simulated from the sleeps; a Chrome trace of both."""
    events = run_ranks(lambda rank: train(rank, schedule, pp, m, WARMUP + 1).timeline(), pp)[0]
    v = STAGES_PER_RANK[schedule]
    costs = {"forward_cost": FORWARD_S / v, "backward_cost": BACKWARD_S / v}
    simulated = simulate(schedule, pp, m, v, **costs)
    real_s = max(e.end_s for e in events) - min(e.start_s for e in events)
    title = (
        f"{schedule}, {pp} processes: simulated {simulated.step_time:.3f} s, real {real_s:.3f} s"
    )
    simulated.to_png(path, measured=events, title=title)
    simulated.to_chrome_trace(path.with_suffix(".json"), measured=events)
    print(f"{title}\n{path}, {path.with_suffix('.json')}")


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="pairs of steps of each line")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--small", action="store_true", help="2 ranks, 4 micro-batches, 3 pairs")
    parser.add_argument("--picture", type=Path, help="draw a step instead, and trace it beside")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.picture:
        draw(arguments.picture)
        return
    if arguments.small:
        arguments.repeats, arguments.ranks, arguments.microbatches = 3, [2], [4]
    print(
        f"A rank sleeps {(FORWARD_S + BACKWARD_S) * 1e3:.0f} ms for each micro-batch; "
        f"{arguments.repeats} pairs of steps, median [min, max]; bar {BAR} between the two\n"
        f"{'schedule':<16} {'p':>2} {'m':>3} {'ideal_s':>7} {'ours':>21} {'torch':>21} "
        f"{'formula':>8} {'ours - torch':>22}"
    )
    worst = 0.0
    for schedule, v in STAGES_PER_RANK.items():
        for pp in arguments.ranks:
            for m in arguments.microbatches:
                steps = run_ranks(
                    lambda rank, case=(schedule, pp, m): pairs_of_steps(
                        rank, *case, arguments.repeats
                    ),
                    pp,
                    timeout_s=600.0,
                )[0]
                ideal_s = m * (FORWARD_S + BACKWARD_S)
                bubbles = [
                    [seconds / ideal_s - 1 for seconds in side] for side in zip(*steps, strict=True)
                ]
                apart = [ours - torchs for ours, torchs in zip(*bubbles, strict=True)]
                worst = max(worst, abs(statistics.median(apart)))
                print(
                    f"{schedule:<16} {pp:>2} {m:>3} {ideal_s:>7.2f} {shown(bubbles[0]):>21} "
                    f"{shown(bubbles[1]):>21} {(pp - 1) / (m * v):>8.3f} {shown(apart):>22}",
                    flush=True,
                )
    print(f"largest distance of the medians {worst:.4f} (bar {BAR})")


if __name__ == "__main__":
    main()
