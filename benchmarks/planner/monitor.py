"""What RooflineMonitor costs, between analyses and while a step is analysed; and final weights.

    python benchmarks/planner/monitor.py     # two minutes on one core

A Llama whose step takes about 20 ms, by our PretrainModule; one thread, CPU time. The same run
without the monitor, with one that analyses a single step, and with one that analyses each, in
turns; medians of steps. Beside it the monitor's hooks by themselves, timed where the Trainer calls
them: what they add is less than the spread of a step. Bars: 1 % of the step between analyses, 2.5
times the step for one that is analysed, and the same weights to the bit.
"""

import argparse
import hashlib
import time
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from lightning_align import PretrainModule, RooflineMonitor

WARMUP, STEPS = 5, 60
BAR, BAR_OF_ANALYSIS = 0.01, 2.5
FOLDER = TemporaryDirectory()  # of tables, of which nothing is left
HOOKS = (
    "_begin_fetch",
    "_end_fetch",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_train_batch_end",
)


class Timed(RooflineMonitor):
    """Times its own hooks."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps, hardware="cpu", plot=False)
        self.hooks_s: list[float] = [0.0]

    def _timed(self, name: str, *given: Any) -> None:
        start_s = time.thread_time()
        getattr(super(), name)(*given)
        self.hooks_s[-1] += time.thread_time() - start_s
        if name == HOOKS[-1]:
            self.hooks_s.append(0.0)


for hook in HOOKS:
    setattr(Timed, hook, lambda self, *given, hook=hook: Timed._timed(self, hook, *given))


class Clock(pl.Callback):
    """CPU time from batch to batch."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.at.append(time.thread_time())


def run(monitor: RooflineMonitor | None) -> tuple[float, str]:
    """Median seconds of a step, and a hash of the final weights."""
    pl.seed_everything(0, verbose=False)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    module = PretrainModule(config, optimizer=partial(torch.optim.AdamW, lr=1e-3))
    rows = torch.randint(1024, (WARMUP + STEPS, 4, 65))
    batches = DataLoader([{"input_ids": ids, "labels": ids} for ids in rows], batch_size=None)
    clock = Clock()
    trainer = pl.Trainer(
        default_root_dir=FOLDER.name,
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[clock, *([monitor] if monitor else [])],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches)
    spans = [
        late - early
        for early, late in zip(clock.at[WARMUP:-1], clock.at[WARMUP + 1 :], strict=True)
    ]
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.numpy().tobytes())
    return median(spans), digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"without": [], "between": [], "analysed": []}
    hooks, weights = [], set()
    for _ in range(rounds):
        quiet, busy = Timed(10**9), Timed(1)
        for side, monitor in (("without", None), ("between", quiet), ("analysed", busy)):
            seconds, digest = run(monitor)
            times[side].append(seconds)
            weights.add(digest)
        hooks.append(median(quiet.hooks_s[WARMUP:]))
    ms = {side: 1e3 * median(found) for side, found in times.items()}
    spread = {side: 1e3 * (max(found) - min(found)) for side, found in times.items()}
    print("| | ms of CPU time a step | spread |\n|---|---|---|")
    for side, found in ms.items():
        print(f"| {side} | {found:.2f} | {spread[side]:.2f} |")
    share = 1e3 * median(hooks) / ms["without"]
    us = 1e6 * median(hooks)
    print(f"\nhooks between analyses: {us:.0f} us, {share:.2%} of a step; bar {BAR:.0%}")
    ratio = ms["analysed"] / ms["without"]
    print(f"a step that is analysed: {ratio:.2f} of one that is not; bar {BAR_OF_ANALYSIS}")
    print("final weights: the same bits" if len(weights) == 1 else "final weights: **differ**")


if __name__ == "__main__":
    main()
