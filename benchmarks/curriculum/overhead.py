"""What Curriculum adds to a step: its hooks, and the cut of a batch.

    python benchmarks/curriculum/overhead.py              # a minute on one core
    python benchmarks/curriculum/overhead.py --rounds 1

A step of next to nothing, whose time does not depend on how long rows are, on batches of 8 rows of
1024 predictions with labels and positions, with and without Curriculum in turn in one process, one
thread; CPU time from the end of a step to the end of the next, medians over a run, then over the
rounds. Without it the run has ExactResume as well, which both need. Bar 0.3 ms, aim 0.1 ms.

Feedback is truncate paced by losses: each step hands its loss over, and every twentieth or so a
decision is taken.
"""

import argparse
import logging
import statistics
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[1]))

from next_to_nothing import QUIET, OneNumber, Steps

from lightning_align import Curriculum, ExactResume

WARMUP, STEPS, ROWS, TOKENS = 50, 300, 8, 1024
MODES = ("truncate", "reshape")
BAR_MS, AIM_MS = 0.3, 0.1


def curriculum(mode: str) -> Curriculum:
    """Sixteen lengths over the run."""
    pacing = {"total_curriculum_step": STEPS}
    if mode == "feedback":  # this loss has always flattened
        pacing = {"window": STEPS // 32, "threshold": 0.5, "lag": 2}
    scheduler = {
        "min_difficulty": 64,
        "max_difficulty": TOKENS,
        "schedule_type": "self_paced" if mode == "feedback" else "fixed_linear",
        "schedule_config": {**pacing, "difficulty_step": 64},
    }
    length = {"mode": mode if mode in MODES else "truncate", "scheduler": scheduler}
    return Curriculum(length=length, preflight=False, filename=None)


def step_ms(batches: list[dict[str, Tensor]], callback: pl.Callback) -> float:
    """Median CPU milliseconds of a step."""
    steps = Steps()
    trainer = pl.Trainer(callbacks=[ExactResume(), callback, steps], **QUIET)
    trainer.fit(OneNumber(), DataLoader(batches, batch_size=None))
    return statistics.median(steps.seconds[WARMUP:]) * 1e3


def main() -> None:
    """Print all modes and what they add."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="repeats of each run")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    ids = torch.randint(2048, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(TOKENS + 1).repeat(ROWS, 1)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    batches = [batch] * (WARMUP + STEPS)
    added: dict[str, list[float]] = {mode: [] for mode in (*MODES, "feedback")}
    for _ in range(rounds):
        for mode, found in added.items():
            without = step_ms(batches, pl.Callback())
            found.append(step_ms(batches, curriculum(mode)) - without)
    print(f"{ROWS} rows of {TOKENS} tokens, {rounds} rounds of {STEPS} steps; ms of CPU time")
    for mode, found in added.items():
        spread = f"[{min(found):.3f}, {max(found):.3f}]"
        print(f"{mode:9s} adds {statistics.median(found):.3f} {spread}; bar {BAR_MS}, aim {AIM_MS}")


if __name__ == "__main__":
    main()
