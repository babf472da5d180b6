"""Stability: which learning rate and batch train without a spike, with rows that grow and without.

    python benchmarks/curriculum/stability.py             # 108 runs, half an hour; resumable
    python benchmarks/curriculum/stability.py --report    # tables of what is finished

Sequence length warm-up is said to let batch and learning rate be several times as large (Li, Zhang
and He, arXiv:2108.06084). A Llama of 2 blocks and width 64 learns the novels of study.py, with its
data, optimizer, schedule in tokens and clipping by norm at 1, for as many tokens as STEPS whole
batches have. Rows are whole, or grow from 32 to 512 tokens over the first 0.4 of the tokens, as in
the study: reshaped, so that a step keeps its tokens, or truncated, so that there are more steps.

A spike begins with a step that SpikeDetector flags as it is by default, after one that it does not;
it is told of changes of length, as SpikeGuard tells it, and gives its first verdict at step 65. A
run has diverged when a loss is not finite, or its last ones are not below its first. The paper's
own measure has no such wait: steps whose loss is above 1.2 times the least before them. Batches
that are truncated are small, and their losses differ by chance as well.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch
from study import (  # the script beside this one
    BLOCK,
    CACHE,
    SEEDS,
    Runs,
    Setting,
    arguments,
    curriculum_of,
    fit,
    module_of,
    schedule_of,
    text,
)

from lightning_align import Curriculum, SpikeDetector
from lightning_align.run.position import batches_consumed

ARMS = {"baseline": "whole rows", "reshape": "reshape", "truncate": "truncate"}
ROWS = (2, 8)
RATES = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.16)
STEPS = 160  # with whole rows
LAST = 16  # steps whose loss is that of the end
RATIO = 1.2  # of the least loss before: the paper's measure
SIZES = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2}


class Record(pl.Callback):
    """Loss and gradient norm of each step, and at which the length changes."""

    def __init__(self, curriculum: Curriculum | None) -> None:
        self.curriculum = curriculum
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.changes: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.curriculum and self.curriculum.planned_change(batches_consumed(trainer)):
            self.changes.append(len(self.losses))

    def on_train_batch_end(self, _: pl.Trainer, module: Any, *__: Any) -> None:
        loss, norm = map(float, module.measured_step)
        self.losses.append(round(loss, 4))
        self.norms.append(float(f"{norm:.4g}"))


def run(name: str) -> dict[str, Any]:
    setting = Setting.read(name)
    tokens = STEPS * setting.rows * BLOCK
    given, _ = curriculum_of(setting, tokens)
    curriculum = Curriculum(**given, preflight=False, filename=None) if given else None
    record = Record(curriculum)
    callbacks = [schedule_of(tokens), *([curriculum] if curriculum else []), record]
    fit(module_of(setting, **SIZES), text(setting.seed, setting.rows), callbacks)
    return {"losses": record.losses, "norms": record.norms, "changes": record.changes}


# What a run came to


def spikes(found: dict[str, Any]) -> int:
    """How many begin."""
    detector, begun, inside = SpikeDetector(), 0, False
    for step, loss in enumerate(found["losses"]):
        if step in found["changes"]:
            detector.planned_change("rows of another length")
        flagged = detector.update(step, loss, found["norms"][step]).is_spike
        begun += flagged and not inside
        inside = flagged
    return begun


def diverged(found: dict[str, Any]) -> bool:
    losses = found["losses"]
    return not all(map(math.isfinite, losses)) or fmean(losses[-LAST:]) >= losses[0]


def high_steps(found: dict[str, Any]) -> float:
    """Per cent of the steps that are above RATIO times the least loss before."""
    least, high = math.inf, 0
    for loss in found["losses"]:
        high += not loss <= RATIO * least
        least = min(least, loss)
    return 100 * high / len(found["losses"])


# Tables


def names(arm: str, rows: int, lr: float) -> list[str]:
    return [Setting(arm, rows, lr, seed).name for seed in SEEDS]


def table(runs: Runs, title: str, rows: int, of: Any) -> None:
    """One cell for each arm and learning rate, of all seeds that are finished."""
    print(f"\n| {title}, {rows} rows | " + " | ".join(f"{lr:g}" for lr in RATES) + " |")
    print("|---|" + "---:|" * len(RATES))
    for arm, shown in ARMS.items():
        cells = []
        for lr in RATES:
            found = [runs.found[name] for name in names(arm, rows, lr) if name in runs.found]
            cells.append(", ".join(map(of, found)))
        print(f"| {shown} | " + " | ".join(cells) + " |")


def largest(runs: Runs, arm: str, rows: int, most: int) -> str:
    """The learning rate up to which so many seeds at most have a spike or diverge."""
    calm = "none"
    for lr in RATES:
        found = [runs.found[name] for name in names(arm, rows, lr) if name in runs.found]
        if len(found) < len(SEEDS):
            return ""
        if sum(spikes(each) > 0 or diverged(each) for each in found) > most:
            return calm
        calm = f"{lr:g}"
    return f"{calm} or more"


def report(runs: Runs) -> None:
    for rows in ROWS:
        table(
            runs,
            "spikes by seed, d: diverged",
            rows,
            lambda found: f"{spikes(found)}{'d' if diverged(found) else ''}",
        )
        end = f"loss of the last {LAST} steps"
        table(runs, end, rows, lambda found: f"{fmean(found['losses'][-LAST:]):.2f}")
        high = f"% of steps above {RATIO} times the least loss before"
        table(runs, high, rows, lambda found: f"{high_steps(found):.1f}")
    print("\n| largest learning rate without a spike | of any seed | of two seeds |")
    print("|---|---:|---:|")
    for rows in ROWS:
        for arm, shown in ARMS.items():
            of_any, of_two = (largest(runs, arm, rows, most) for most in (0, 1))
            print(f"| {shown}, {rows} rows of {BLOCK} tokens | {of_any} | {of_two} |")


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(runs=CACHE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, lightning {pl.__version__}")
    sys.stdout.flush()
    runs = Runs(given.runs / "stability.jsonl")
    # Small batches first, and a seed at a time: whenever it is stopped, tables are comparable.
    todo = [Setting(arm, rows, lr, s) for rows in ROWS for s in SEEDS for lr in RATES for arm in ARMS]
    runs.finish([setting.name for setting in todo], run, given.limit)
    report(runs)


if __name__ == "__main__":
    main()
