"""What ExactResume adds to a step that computes next to nothing. Bar: at most 100 us of CPU time.

    python benchmarks/overhead_callback.py     # half a minute

One thread, with and without in turn in one process; besides, its hook timed where the Trainer calls
it. Finished rounds are kept under benchmarks/cache/overhead; --fresh forgets them.
"""

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from next_to_nothing import OneNumber
from overhead import WARMUP, Figures, SideBySide, arguments, remembered, spread
from torch.utils.data import DataLoader

from lightning_align import ExactResume

STEPS = 1000
BAR_US = 100


class TimedHooks(ExactResume):
    """Times the hook that runs in every step, where the Trainer calls it."""

    hook_s = 0.0

    def on_train_batch_start(self, *arguments: Any) -> None:
        start_s = time.process_time()
        super().on_train_batch_start(*arguments)
        self.hook_s += time.process_time() - start_s


def one_number(callback: ExactResume | None) -> Figures:
    clock = SideBySide(lambda _: None, STEPS)
    trainer = pl.Trainer(
        max_steps=WARMUP + STEPS,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[clock, *([callback] if callback else [])],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    batches = DataLoader([torch.zeros(())] * (WARMUP + STEPS), batch_size=None)
    trainer.fit(OneNumber(), batches)
    hook_s = getattr(callback, "hook_s", 0.0) / trainer.global_step
    return {"step_us": 1e6 * clock.totals["cpu_s"] / STEPS, "hook_us": 1e6 * hook_s}


def main() -> None:
    options = arguments(__doc__)
    sides: dict[str, Callable[[], ExactResume | None]] = {
        "without": lambda: None,
        "ExactResume": ExactResume,
        "its hook, timed": TimedHooks,
    }
    runs: dict[str, list[Figures]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side, build in sides.items():
            measured = remembered(f"callback {side} {number}", lambda b=build: one_number(b()))
            runs[side].append(measured)
    step_us = {side: [run["step_us"] for run in runs[side]] for side in sides}
    pairs = zip(step_us["ExactResume"], step_us["without"], strict=True)
    added = [slow - fast for slow, fast in pairs]
    print("\nExactResume, a step of one number, us of CPU time a step")
    print("| without | with | added | on_train_batch_start alone |\n|---|---|---|---|")
    hook = [run["hook_us"] for run in runs["its hook, timed"]]
    cells = [spread(v, 1) for v in (step_us["without"], step_us["ExactResume"], added, hook)]
    print(f"| {' | '.join(cells)} |")
    print(f"bar: at most {BAR_US} us added")


if __name__ == "__main__":
    main()
