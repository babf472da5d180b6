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
import logging
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

sys.path.append(str(Path(__file__).parents[2]))  # tests.helpers: forked ranks, layers that sleep

from lightning_align import PipelineStrategy
from lightning_align.pipelining import simulate
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.sleeping_pipeline import SleepingStage

FORWARD_S, BACKWARD_S = 0.050, 0.100  # of a rank, for one micro-batch
STAGES_PER_RANK = {"1F1B": 1, "Interleaved1F1B": 2}
WARMUP, BAR = 2, 0.03

Steps = list[tuple[float, float]]  # seconds of ours, seconds of torch's


def layers(schedule: str, pp: int) -> list[SleepingStage]:
    """One for each stage."""
    v = STAGES_PER_RANK[schedule]
    return [SleepingStage(i, FORWARD_S / v, BACKWARD_S / v, []) for i in range(pp * v)]


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


class Module(pl.LightningModule):
    """The user's side: nothing but a loss."""

    def __init__(self, schedule: str, pp: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers(schedule, pp))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = loss_of(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class Raw:
    """The same on torch alone."""

    def __init__(self, schedule: str, rank: int, pp: int, microbatches: int) -> None:
        every = layers(schedule, pp)
        stages = [
            PipelineStage(every[index], index, len(every), torch.device("cpu"))
            for index in range(rank, len(every), pp)
        ]
        self.is_first, self.is_last = rank == 0, rank == pp - 1
        self.schedule = get_schedule_class(schedule)(
            stages if len(stages) > 1 else stages[0], microbatches, loss_fn=loss_of
        )
        parameters = [p for stage in stages for p in stage.submod.parameters()]
        self.optimizer = torch.optim.SGD(parameters, 0.01)

    def step(self, batch: list[Tensor]) -> None:
        self.optimizer.zero_grad()
        inputs = [batch[0]] if self.is_first else []
        target = batch[1] if self.is_last else None
        losses: list[Tensor] = []
        self.schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        self.optimizer.step()


class Alternate(pl.Callback):
    """After each step of Lightning's loop, one of torch's; times of both."""

    def __init__(self, raw: Raw) -> None:
        self.raw = raw
        self.steps: Steps = []
        self.started = 0.0

    def on_train_batch_end(self, *args: Any) -> None:
        distributed.barrier()
        now = time.perf_counter()
        ours = now - self.started
        self.raw.step(args[3])
        distributed.barrier()
        self.steps.append((ours, time.perf_counter() - now))
        self.started = time.perf_counter()


def fit(
    rank: int, schedule: str, pp: int, microbatches: int, steps: int, *callbacks: pl.Callback
) -> Any:
    """Train under the strategy, which is returned."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    recorded = not callbacks  # what is timed records nothing
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=pp,
        strategy=PipelineStrategy(
            schedule, num_microbatches=microbatches, record_timeline=recorded
        ),
        plugins=[ForkedRanks(rank, pp)],
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch = [torch.ones(microbatches, 1), torch.zeros(microbatches, 1)]
    trainer.fit(Module(schedule, pp), DataLoader([batch] * steps, batch_size=None))
    return trainer.strategy


def pairs_of_steps(rank: int, schedule: str, pp: int, microbatches: int, repeats: int) -> Steps:
    """Seconds of ``repeats`` pairs of steps."""
    alternate = Alternate(Raw(schedule, rank, pp, microbatches))
    fit(rank, schedule, pp, microbatches, repeats + WARMUP, alternate)
    return alternate.steps[WARMUP:]


def draw(path: Path, schedule: str = "Interleaved1F1B", pp: int = 4, m: int = 8) -> None:
    """A real step below the one that is simulated from the sleeps; a Chrome trace of both."""
    events = run_ranks(lambda rank: fit(rank, schedule, pp, m, WARMUP + 1).timeline(), pp)[0]
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
