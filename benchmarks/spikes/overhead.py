"""What SpikeGuard adds to a step, in CPU time of its thread.

    python benchmarks/spikes/overhead.py              # some minutes on one core
    python benchmarks/spikes/overhead.py --rounds 1

Two questions. Of a step of next to nothing, whose module hands loss and norm over: what the guard's
own hooks cost, without the norm and with reports off; bar 0.2 ms. Of a training step of about 20 ms
of a small Llama: what it adds with snapshots for rewinds, as a share of the step; bar 3 %. The last
row, without a bar, is what figures by layer take where there is a report or a logger. With and
without in turn in one process, one thread; means over the steps of a run, as some of them have a
snapshot, and medians over the rounds.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig

sys.path.append(str(Path(__file__).parents[1]))

from next_to_nothing import QUIET, OneNumber, Steps

from lightning_align import PretrainModule, SpikeGuard

WARMUP, STEPS = 100, 500
BAR_MS, BAR_SHARE = 0.2, 0.03


class Told(OneNumber):
    """It says what its step came to."""

    def __init__(self) -> None:
        super().__init__()
        self.measured_step = torch.ones(()), torch.ones(())


def run(module: pl.LightningModule, batches: Any, guard: SpikeGuard | None) -> list[float]:
    """CPU seconds of each step behind the warm-up."""
    steps = Steps()
    callbacks = [steps, *([guard] if guard else [])]
    pl.Trainer(callbacks=callbacks, **QUIET).fit(module, DataLoader(batches, batch_size=None))
    return steps.seconds[WARMUP:]


def llama_run(guard: SpikeGuard | None) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2048, (WARMUP + 300, 8, 65), generator=generator)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=2048, num_attention_heads=2, **sizes)
    return run(PretrainModule(config), [{"input_ids": i, "labels": i} for i in ids], guard)


def number_run(guard: SpikeGuard | None) -> list[float]:
    return run(Told(), [torch.zeros(())] * (WARMUP + STEPS), guard)


def compared(
    side: Callable[[SpikeGuard | None], list[float]], make: Callable[[], SpikeGuard], rounds: int
) -> tuple[float, float]:
    """(CPU milliseconds of a step without a guard, what the guard adds): medians over rounds.

    The mean over a run, since a snapshot is in some of its steps only.
    """
    without, added = [], []
    for _ in range(rounds):
        plain, guarded = statistics.fmean(side(None)), statistics.fmean(side(make()))
        without.append(1e3 * plain)
        added.append(1e3 * (guarded - plain))
    return statistics.median(without), statistics.median(added)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    sides = {
        "one number, reports off": (number_run, partial(SpikeGuard, preview_tokens=0)),
        "small Llama": (llama_run, SpikeGuard),
        "small Llama, snapshots every 50 steps": (
            llama_run,
            partial(SpikeGuard, ["skip", "rewind"], rewind_steps=50, snapshot_every_n_steps=50),
        ),
        "small Llama, figures by layer for a report": (
            llama_run,
            partial(SpikeGuard, report_dir=tempfile.mkdtemp()),  # stays empty
        ),
    }
    print("| step | CPU ms without | SpikeGuard adds, ms | share |\n|---|---:|---:|---:|")
    for name, (side, make) in sides.items():
        without, added = compared(side, make, rounds)
        print(f"| {name} | {without:.3f} | {added:.3f} | {added / without:.1%} |", flush=True)
    print(f"bars: {BAR_MS} ms of the first, {BAR_SHARE:.0%} with snapshots")


if __name__ == "__main__":
    main()
