"""What the diagnostics of pairs add to a step, in CPU time. Bar: at most 0.5 ms.

    python benchmarks/dpo/diagnostics.py     # half a minute

One thread. A window of one batch of scored pairs, from the losses to the metrics that are logged,
with and without ``pair_statistics``, in turn in one process; and the hook of
``PreferenceDiagnostics`` after each step, which closes a histogram every 20 steps, where the
Trainer would call it.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

sys.path.append(str(Path(__file__).parents[1]))

from hardware import hardware

from lightning_align import PreferenceDiagnostics
from lightning_align.losses import CompletionLogps, preference_step, with_margins
from lightning_align.losses import dpo as losses_dpo
from lightning_align.modules.window import Sums, collect, means_over_ranks, take_totals

PAIRS, TOKENS = (8, 64), 128
REPEATS, CALLS = 15, 100
BAR_MS = 0.5


def scored(pairs: int, seed: int) -> CompletionLogps:
    generator = torch.Generator().manual_seed(seed)
    logps_BT = -torch.rand(2 * pairs, TOKENS, generator=generator)
    lengths_B = torch.randint(1, TOKENS + 1, (2 * pairs,), generator=generator)
    ones_B = torch.ones(2 * pairs)
    return CompletionLogps(logps_BT.sum(1), lengths_B, ones_B, ones_B, ones_B, logps_BT)


def window(policy: CompletionLogps, reference: CompletionLogps, alone: Any) -> None:
    """What a step does with scored pairs, but for the gradient and the log."""
    _, metrics = preference_step(policy, reference)
    sums: Sums = {name: (mean.total, mean.count) for name, mean in metrics.items()}
    sums["tokens"] = (policy.lengths_B.sum(), torch.ones(()))
    accumulated: dict[str, torch.Tensor] = {}
    collect(sums, accumulated)
    means, weights = means_over_ranks(alone, accumulated)
    means |= with_margins(means)
    take_totals(means, weights)


def milliseconds(call: Any) -> float:
    start_s = time.process_time()
    for _ in range(CALLS):
        call()
    return 1e3 * (time.process_time() - start_s) / CALLS


def of_window(pairs: int) -> tuple[list[float], list[float]]:
    """Milliseconds of a window (with, without), alternated."""
    alone = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda sums, **_: sums))
    policy, reference = scored(pairs, 0), scored(pairs, 1)
    sides: tuple[list[float], list[float]] = ([], [])
    for repeat in range(REPEATS + 1):
        ours = milliseconds(lambda: window(policy, reference, alone))
        with patch.object(losses_dpo, "pair_statistics", lambda *_: {}):
            bare = milliseconds(lambda: window(policy, reference, alone))
        if repeat:  # the first is a warm-up
            sides[0].append(ours)
            sides[1].append(bare)
    return sides


def of_hook() -> list[float]:
    """Milliseconds of the callback's hook after a step."""
    callback = PreferenceDiagnostics(every_n_train_steps=20)
    trainer: Any = SimpleNamespace(global_step=0)
    module: Any = SimpleNamespace(margin_counts=torch.ones(120))

    def after_a_step() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)

    return [milliseconds(after_a_step) for _ in range(REPEATS + 1)][1:]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main() -> None:
    torch.set_num_threads(1)
    print(f"{hardware()}; Python {platform.python_version()}, torch {torch.__version__}")
    hook = of_hook()
    for pairs in PAIRS:
        ours, bare = of_window(pairs)
        added = statistics.median(ours) - statistics.median(bare)
        total = added + statistics.median(hook)
        verdict = "met" if total <= BAR_MS else "MISSED"
        print(
            f"{pairs} pairs: with {spread(ours)} ms, without {spread(bare)} ms; hook"
            f" {spread(hook)} ms; added in all {total:.3f} ms (bar {BAR_MS}: {verdict})"
        )


if __name__ == "__main__":
    main()
