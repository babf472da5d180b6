"""Stability: which learning rate and batch train without a spike, with rows that grow and without.

    python benchmarks/curriculum/stability.py             # 126 runs, half an hour; resumable
    python benchmarks/curriculum/stability.py --report    # tables of what is finished

Sequence length warm-up is said to let batch and learning rate be several times as large (Li, Zhang
and He, arXiv:2108.06084). A Llama of 2 blocks and width 64 learns the novels of study.py, with its
data and schedule in tokens, for as many tokens as STEPS whole batches have. AdamW is as torch has
it, with a beta2 of 0.999, and nothing is clipped: with the study's 0.95 and clipping by norm there
was no spike on the seed that this was designed with. Rows are whole, or grow from 32 to 256 tokens
over the first 0.4 of the tokens: reshaped, so that a step keeps its tokens, or truncated, so that
there are more steps.

A spike begins with a step that SpikeDetector flags as it is by default, after one that it does not;
it is told of changes of length, as SpikeGuard tells it, and gives its first verdict at step 65. A
run has diverged when a loss is not finite, or its last ones are not below its first. The paper's
own measure has no such wait: steps whose loss is above 1.2 times the least before them. Batches
that are truncated are small, and their losses differ by chance as well. A learning rate may be calm
and still learn nothing: so there is the largest one, too, with which the median of the last losses
is within 5 % of the best that whole rows reach with that batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import fmean, median
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
    given_to,
    module_of,
    schedule_of,
    text,
)

from lightning_align import Curriculum, SpikeDetector
from lightning_align.run.position import batches_consumed

ARMS = {"baseline": "whole rows", "reshape": "reshape", "truncate": "truncate"}
ROWS = (2, 8)
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.16)
STEPS = 256  # with whole rows
LAST = 16  # steps whose loss is that of the end
LEARNS = 1.05  # of the best loss of whole rows
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
    optimizer = partial(torch.optim.AdamW, lr=setting.lr, fused=True)
    data = text(setting.seed, setting.rows)
    fit(module_of(setting, optimizer, **SIZES), data, callbacks, clip=None)
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


def end(found: dict[str, Any]) -> float:
    """Loss of the last steps; infinite if it is none."""
    loss = fmean(found["losses"][-LAST:])
    return loss if loss == loss else math.inf


# Tables


def cell(runs: Runs, arm: str, rows: int, lr: float) -> list[dict[str, Any]]:
    """The finished runs of a setting."""
    return runs.named(Setting(arm, rows, lr, -1).name.replace("/-1", "/{seed}"), SEEDS)


def table(runs: Runs, title: str, rows: int, shown: Callable[[dict[str, Any]], str]) -> None:
    print(f"\n| {title}, {rows} rows | " + " | ".join(f"{lr:g}" for lr in RATES) + " |")
    print("|---|" + "---:|" * len(RATES))
    for arm, name in ARMS.items():
        cells = [", ".join(map(shown, cell(runs, arm, rows, lr))) for lr in RATES]
        print(f"| {name} | " + " | ".join(cells) + " |")


def largest(runs: Runs, arm: str, rows: int, holds: Callable[[list[dict[str, Any]]], bool]) -> str:
    """The learning rate up to which something holds of all seeds; empty while some are missing."""
    found = [cell(runs, arm, rows, lr) for lr in RATES]
    if any(len(each) < len(SEEDS) for each in found):
        return ""
    held = [lr for lr, each in zip(RATES, found, strict=True) if holds(each)]
    first = next((lr for lr in RATES if lr not in held), None)
    below = [lr for lr in RATES if first is None or lr < first]
    return f"{below[-1]:g}{' or more' if first is None else ''}" if below else "none"


def learns(runs: Runs, arm: str, rows: int) -> str:
    """The largest learning rate that ends near the best that whole rows reach."""
    every = [cell(runs, each, rows, lr) for each in ("baseline", arm) for lr in RATES]
    if any(len(each) < len(SEEDS) for each in every):
        return ""
    ends = [median(map(end, each)) for each in every]
    best, own = min(ends[: len(RATES)]), ends[len(RATES) :]
    fine = [lr for lr, loss in zip(RATES, own, strict=True) if loss <= LEARNS * best]
    return f"{max(fine):g}" if fine else "none"


def is_calm(found: dict[str, Any]) -> bool:
    return not (spikes(found) or diverged(found))


def report(runs: Runs) -> None:
    titles: dict[str, Callable[[dict[str, Any]], str]] = {
        "spikes by seed, d: diverged": lambda found: f"{spikes(found)}{'d' * diverged(found)}",
        f"loss of the last {LAST} steps": lambda found: f"{end(found):.2f}",
        f"% of steps above {RATIO} times the least loss before": lambda found: (
            f"{high_steps(found):.1f}"
        ),
    }
    for title, shown in titles.items():
        for rows in ROWS:
            table(runs, title, rows, shown)
    print("\n| largest learning rate | no spike on any seed | on two of three | learns |")
    print("|---|---:|---:|---:|")
    for rows in ROWS:
        for arm, name in ARMS.items():
            of_all = largest(runs, arm, rows, lambda found: all(map(is_calm, found)))
            of_two = largest(runs, arm, rows, lambda found: sum(map(is_calm, found)) > 1)
            best = learns(runs, arm, rows)
            print(f"| {name}, {rows} rows of {BLOCK} tokens | {of_all} | {of_two} | {best} |")


def main() -> None:
    given = given_to(arguments(__doc__), CACHE)
    runs = Runs(given.runs / "stability.jsonl")
    # Small batches first, and a seed at a time: tables of what is finished are comparable.
    settings = [
        Setting(arm, rows, lr, seed)
        for rows in ROWS
        for seed in SEEDS
        for lr in RATES
        for arm in ARMS
    ]
    runs.finish([setting.name for setting in settings], run, given.limit)
    report(runs)


if __name__ == "__main__":
    main()
