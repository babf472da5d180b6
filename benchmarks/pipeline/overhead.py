"""Claim: a step under PipelineStrategy takes as long as one of torch.distributed.pipelining itself.

Both run in the same two gloo processes, on the same stages and micro-batches, step by step in turn:
Lightning's whole loop with a logged loss against ``schedule.step`` and ``optimizer.step``. At least
0.95 of torch's throughput under 1F1B and 0.93 interleaved (median of the pairs, 95 % interval).

    python benchmarks/pipeline/overhead.py [--pairs 40] [--rows 256] [--schedule 1F1B ...]
"""

import argparse
import logging
import math
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[2]))  # tests.helpers: forked ranks

from lightning_align import PipelineStrategy
from tests.helpers.ranks import ForkedRanks, run_ranks

WIDTH, LAYERS, RANKS, MICROBATCHES, WARMUP = 512, 8, 2, 4, 3
BARS = {"1F1B": 0.95, "Interleaved1F1B": 0.93}


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            nn.Sequential(
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 4 * WIDTH),
                nn.GELU(),
                nn.Linear(4 * WIDTH, WIDTH),
            )
            for _ in range(LAYERS)
        )
    )


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


class Module(pl.LightningModule):
    """The user's side: nothing but a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = layers()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = loss_of(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


class Raw:
    """The same on torch alone."""

    def __init__(self, schedule: str, rank: int) -> None:
        per_rank = 2 if schedule == "Interleaved1F1B" else 1
        num_stages = RANKS * per_rank
        size = LAYERS // num_stages
        net = list(layers())
        stages = [
            PipelineStage(
                nn.Sequential(*net[index * size : (index + 1) * size]),
                index,
                num_stages,
                torch.device("cpu"),
            )
            for index in range(rank, num_stages, RANKS)
        ]
        self.rank = rank
        self.schedule = get_schedule_class(schedule)(
            stages if per_rank > 1 else stages[0], MICROBATCHES, loss_fn=loss_of
        )
        parameters = [p for stage in stages for p in stage.submod.parameters()]
        self.optimizer = torch.optim.AdamW(parameters)

    def step(self, batch: list[Tensor]) -> None:
        self.optimizer.zero_grad()
        inputs = [batch[0]] if self.rank == 0 else []
        target = batch[1] if self.rank == RANKS - 1 else None
        losses: list[Tensor] = []
        self.schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        self.optimizer.step()


class Alternate(pl.Callback):
    """After each step of Lightning's loop, one of torch's; times of both."""

    def __init__(self, raw: Raw) -> None:
        self.raw = raw
        self.pairs: list[tuple[float, float]] = []
        self.started = 0.0

    def on_train_batch_end(self, *args: Any) -> None:
        batch = args[3]
        distributed.barrier()
        now = time.perf_counter()
        ours = now - self.started
        self.raw.step(batch)
        distributed.barrier()
        self.pairs.append((ours, time.perf_counter() - now))
        self.started = time.perf_counter()


def run(rank: int, schedule: str, pairs: int, rows: int) -> list[tuple[float, float]]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    alternate = Alternate(Raw(schedule, rank))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=PipelineStrategy(schedule, num_microbatches=MICROBATCHES),
        plugins=[ForkedRanks(rank, RANKS)],
        max_epochs=1,
        callbacks=[alternate],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch = [torch.randn(rows, WIDTH) for _ in range(2)]
    loader = DataLoader([batch] * (pairs + WARMUP), batch_size=None)
    torch.manual_seed(0)
    trainer.fit(Module(), loader)
    return alternate.pairs[WARMUP:]


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
    parser.add_argument("--schedule", nargs="+", default=list(BARS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{RANKS} gloo processes, {LAYERS} layers of width {WIDTH}, {MICROBATCHES} micro-batches")
    for schedule in arguments.schedule:
        pairs = run_ranks(
            lambda rank, name=schedule: run(rank, name, arguments.pairs, arguments.rows),
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


if __name__ == "__main__":
    main()
