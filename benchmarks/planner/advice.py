"""Pieces of advice that are followed: the gain that RooflineMonitor predicts, and what is measured.

    python benchmarks/planner/advice.py             # about three minutes on one core; resumable
    python benchmarks/planner/advice.py --smoke     # seconds; the figures then mean nothing
    python benchmarks/planner/advice.py --report    # the table of what is finished

For each piece a run in which it is given, and the same run with it followed, in turns; the machine
is measured once (``MachineBalance.measure``). A gain is by how much more rows a second are trained:
medians of steps, CPU time of one thread, but for data and drives, which are waited for, the clock
on the wall. The sign must be right, and the prediction within 5 points of the measured gain or a
third of it.
"""

import argparse
import json
import logging
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_align import MachineBalance, PretrainModule, RooflineMonitor, ZeROInfinityStrategy

RESULTS = Path(__file__).parents[1] / "cache/advice.json"
WARMUP, STEPS, ROUNDS = 4, 24, 5
POINTS, SHARE = 0.05, 1 / 3


def config(**options: int) -> LlamaConfig:
    given = {"vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 4, **options}
    return LlamaConfig(
        intermediate_size=2 * given["hidden_size"],
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        **given,
    )


class Plain(pl.LightningModule):
    """A model of transformers as its users train it: all logits, then the cross-entropy."""

    def __init__(self, of: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(of)

    def training_step(self, batch: dict[str, torch.Tensor], *_: int) -> torch.Tensor:
        logits = self.model(batch["input_ids"][:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


def ours(of: LlamaConfig, fused: bool = True, **options: Any) -> PretrainModule:
    optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=fused)
    return PretrainModule(of, optimizer=optimizer, **options)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Batches of tokens, each of which has to be waited for."""

    def __init__(self, count: int, rows: int, tokens: int, vocabulary: int, wait_s: float) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (count, rows, tokens + 1)
        self.ids, self.wait_s = torch.randint(vocabulary, size, generator=generator), wait_s

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.wait_s:
            time.sleep(self.wait_s)
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@dataclass(frozen=True)
class Side:
    """A run: the module, the shape of a batch, and what the Trainer gets."""

    module: Callable[[], pl.LightningModule]
    rows: int = 2
    tokens: int = 64
    vocabulary: int = 1024
    accumulate: int = 1
    wait_s: float = 0.0
    workers: int = 0
    strategy: Callable[[str], Any] | None = None

    @property
    def rows_of_step(self) -> int:
        return self.rows * self.accumulate


@dataclass(frozen=True)
class Case:
    """A piece of advice: the run that gets it, and the one that has followed it."""

    advice: str
    what: str
    before: Side
    after: Side
    waits: bool = False  # on the wall's clock


SMALL, WIDE, DEEP = config(), config(vocab_size=16384), config(num_hidden_layers=8)


def drive(folder: str) -> Any:
    return ZeROInfinityStrategy(nvme_path=folder, overwrite=True)


def memory(_: str) -> Any:
    return ZeROInfinityStrategy(offload_params_device="cpu", offload_optimizer_device="cpu")


CASES = {
    "micro-batch": Case(
        "larger micro-batch",
        "4 micro-batches of 1 x 32 tokens to 2 of 2 x 32",
        Side(lambda: ours(SMALL), rows=1, tokens=32, accumulate=4),
        Side(lambda: ours(SMALL), rows=2, tokens=32, accumulate=2),
    ),
    "batch": Case(
        "larger micro-batch",
        "a batch of 1 x 64 tokens to 2 x 64",
        Side(lambda: ours(SMALL), rows=1),
        Side(lambda: ours(SMALL), rows=2),
    ),
    "recomputation": Case(
        "no recomputation",
        "8 blocks without activation checkpointing",
        Side(lambda: ours(DEEP, activation_checkpointing=True), rows=2),
        Side(lambda: ours(DEEP), rows=2),
    ),
    "fused": Case(
        "fused optimizer",
        "torch's AdamW of 8 blocks with fused=True",
        Side(lambda: ours(DEEP, fused=False), rows=1),
        Side(lambda: ours(DEEP), rows=1),
    ),
    "chunks": Case(
        "chunked loss",
        "16,384 words, 512 tokens: PretrainModule for all logits at once",
        Side(lambda: Plain(WIDE), rows=4, tokens=128, vocabulary=16384),
        Side(lambda: ours(WIDE), rows=4, tokens=128, vocabulary=16384),
    ),
    "workers": Case(
        "more workers",
        "two workers for batches that take 15 ms to load",
        Side(lambda: ours(SMALL), wait_s=0.015),
        Side(lambda: ours(SMALL), wait_s=0.015, workers=2),
        waits=True,
    ),
    "tier": Case(
        "another tier",
        "ZeROInfinityStrategy: host memory for the drive",
        Side(lambda: ours(WIDE), vocabulary=16384, strategy=drive),
        Side(lambda: ours(WIDE), vocabulary=16384, strategy=memory),
        waits=True,
    ),
}


class Clock(pl.Callback):
    """Time from step to step."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.at = now, list[float]()

    def on_train_batch_start(self, trainer: pl.Trainer, *rest: Any) -> None:
        if rest[-1] % trainer.accumulate_grad_batches == 0:
            self.at.append(self.now())


def run(side: Side, waits: bool, steps: int, monitor: RooflineMonitor | None) -> float:
    """Median seconds of a row."""
    pl.seed_everything(0, verbose=False)
    clock = Clock(time.perf_counter if waits else time.thread_time)
    count = (WARMUP + steps) * side.accumulate
    data = Rows(count, side.rows, side.tokens, side.vocabulary, side.wait_s)
    with TemporaryDirectory(dir=".") as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            strategy=side.strategy(folder) if side.strategy else "auto",
            accumulate_grad_batches=side.accumulate,
            logger=False,
            callbacks=[clock, *([monitor] if monitor else [])],
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(side.module(), DataLoader(data, batch_size=None, num_workers=side.workers))
    late, early = clock.at[WARMUP + 1 :], clock.at[WARMUP:-1]
    spans = [b - a for a, b in zip(early, late, strict=True)]
    return median(spans) / side.rows_of_step


def measured(case: Case, machine: MachineBalance, rounds: int, steps: int) -> dict[str, Any]:
    """Predicted and measured gain of one piece of advice."""
    monitor = RooflineMonitor(10**9, hardware=machine, plot=False)
    run(case.before, case.waits, steps, monitor)
    given = next((a for a in monitor.advice if a.name == case.advice), None)
    gains, seconds = [], []
    for _ in range(rounds):
        before = run(case.before, case.waits, steps, None)
        after = run(case.after, case.waits, steps, None)
        gains.append(before / after - 1)
        seconds.append(before * case.before.rows_of_step)
    return {
        "advice": case.advice,
        "what": case.what,
        "predicted": given.gain if given else None,
        "gain": median(gains),
        "gains": sorted(gains),
        "step_ms": 1e3 * median(seconds),
    }


def is_right(found: dict[str, Any]) -> bool:
    predicted, gain = found["predicted"], found["gain"]
    if predicted is None or predicted * gain <= 0:
        return False
    return abs(predicted - gain) <= max(POINTS, SHARE * abs(gain))


def report(results: dict[str, Any]) -> None:
    print("| advice followed | ms a step before | predicted | measured (lowest, highest) | |")
    print("|---|---|---|---|---|")
    for found in results.values():
        predicted = "**not given**" if found["predicted"] is None else f"{found['predicted']:+.1%}"
        low, high = found["gains"][0], found["gains"][-1]
        verdict = "right" if is_right(found) else "**missed**"
        print(
            f"| {found['advice']}: {found['what']} | {found['step_ms']:.1f} | {predicted} |"
            f" {found['gain']:+.1%} ({low:+.1%}, {high:+.1%}) | {verdict} |"
        )
    right = sum(map(is_right, results.values()))
    print(f"\n{right} of {len(results)} with the right sign, within 5 points or a third")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few steps, nothing kept")
    parser.add_argument("--report", action="store_true", help="what is finished")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and not given.smoke else {}
    if not given.report:
        machine = MachineBalance.measure()
        print(
            f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}"
        )
        for name in given.only:
            if name in results:
                continue
            rounds, steps = (1, 6) if given.smoke else (ROUNDS, STEPS)
            results[name] = measured(CASES[name], machine, rounds, steps)
            if not given.smoke:
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                RESULTS.write_text(json.dumps(results, indent=1))
    report(results)


if __name__ == "__main__":
    main()
