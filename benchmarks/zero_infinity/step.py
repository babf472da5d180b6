"""Speed of zero_infinity against the same training in memory, from I/O- to compute-bound steps.

    python benchmarks/zero_infinity/step.py          # 25 minutes, 1 GB of disk, 330 GB of traffic
    python benchmarks/zero_infinity/step.py --small  # a minute: does it run

A Llama with 8 blocks of width 512 (26 M parameters), AdamW (fused), PretrainModule in a Trainer,
one compute thread. In each repeat, for each number of tokens: the same run in memory, then under
zero_infinity, unclipped (blocks are updated in backward) and clipped (gradients wait on disk), then
the drive alone: as many bytes, read and written in pieces of the same size by the same threads in
the proportions of an unclipped step, and made durable. A step is from one batch's start to the
next one's, the commit included; the median of a run's steps counts, without the first two.

Predicted is the longer of compute (the step in memory) and I/O (bytes over what the drive alone
did), in the same repeat; for a clipped step without the optimizer pass, whose I/O comes on top.
That pass is from on_before_optimizer_step to the end of the step.

Bars: speed of training in memory at the largest number of tokens 0.85, clipped 0.75; at the
smallest, bandwidth 0.6 of the drive's alone; of the optimizer pass 0.8; predicted within 25 %.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from memory import VOCABULARY, llama, moved_bytes, quiet
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[1]))

from chunked_loss import hardware

from lightning_align import PretrainModule
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import DirectFile, Threads
from lightning_align.strategies import ZeROInfinityStrategy

TOKENS = (32, 128, 256, 512, 1024, 2048)
SEQUENCE = 256
MIB = 1 << 20


class Timer(pl.Callback):
    """When steps began, and what had been moved by then."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.marks.append((time.perf_counter(), _moved(trainer)))

    def step(self) -> tuple[float, float]:
        """Median seconds and bytes of a step."""
        marks = self.marks[2:]
        pairs = list(pairwise(marks))
        return median(b[0] - a[0] for a, b in pairs), median(b[1] - a[1] for a, b in pairs)


class PassTimer(Timer):
    """Also the optimizer pass. A hook that sees gradients: for clipped runs only."""

    def __init__(self) -> None:
        super().__init__()
        self.begins: list[tuple[float, int]] = []

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        self.begins.append((time.perf_counter(), _moved(trainer)))

    def update(self) -> tuple[float, float]:
        """Median seconds and bytes of the pass."""
        pairs = list(zip(self.begins, self.marks[1:], strict=False))[2:]
        return median(b[0] - a[0] for a, b in pairs), median(b[1] - a[1] for a, b in pairs)


def _moved(trainer: Any) -> int:
    engine = getattr(trainer.strategy, "_engine", None)
    return engine.threads.traffic.read + engine.threads.traffic.written if engine else 0


def batches(tokens: int, steps: int) -> DataLoader[Any]:
    rows, length = max(1, tokens // SEQUENCE), min(tokens, SEQUENCE)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (steps, rows, length + 1), generator=generator)
    return DataLoader([{"input_ids": x, "labels": x} for x in ids], batch_size=None)


@dataclass(frozen=True)
class Case:
    """What all sides train."""

    width: int
    blocks: int
    steps: int
    folder: str

    def train(self, tokens: int, strategy: Any, timer: Timer, clip: float | None) -> Timer:
        torch.manual_seed(0)
        optimizer = partial(torch.optim.AdamW, lr=1e-4, fused=True)
        module = PretrainModule(llama(self.width, self.blocks), optimizer=optimizer)
        trainer = pl.Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=1,
            max_steps=self.steps,
            gradient_clip_val=clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=self.folder,
            callbacks=[timer],
        )
        trainer.fit(module, batches(tokens, self.steps))
        return timer

    def offloaded(self, tokens: int, timer: Timer, clip: float | None) -> Timer:
        strategy = ZeROInfinityStrategy(nvme_path=str(Path(self.folder, "nvme")), overwrite=True)
        try:
            return self.train(tokens, strategy, timer, clip)
        finally:
            strategy.close()
            shutil.rmtree(Path(self.folder, "nvme"))


def drive_alone(folder: str, nbytes: int, piece: int) -> float:
    """Bytes a second, of reads and writes in proportions of 4 to 3, made durable at the end."""
    threads, pool = Threads(), BufferPool()
    files = [DirectFile(Path(folder, f"alone{i}"), threads) for i in (0, 1)]
    count = max(1, nbytes * 4 // 7 // piece)
    try:
        memories = [pool.take(piece) for _ in range(4)]
        for file in files:
            file.allocate(count * piece)
        for number in range(count):
            files[0].write(memories[0], number * piece).wait()
            files[1].write(memories[0], number * piece).wait()
        files[1].sync().wait()
        start, done = time.perf_counter(), 0
        under_way: list[Any] = []
        for number in range(count):
            under_way.append(files[0].read(memories[number % 2], number * piece))
            done += piece
            if number % 4 != 3:
                under_way.append(files[1].write(memories[2 + number % 2], number * piece))
                done += piece
            while len(under_way) > 3:
                under_way.pop(0).wait()
        for transfer in under_way:
            transfer.wait()
        files[1].sync().wait()
        return done / (time.perf_counter() - start)
    finally:
        for file in files:
            file.close()
            file.path.unlink()
        threads.close()


Figures = dict[str, list[float]]


def repeat(case: Case, tokens: int, found: Figures) -> None:
    """One of each side, one after the other."""
    seconds, _ = case.train(tokens, "auto", Timer(), None).step()
    clipped_seconds, _ = case.train(tokens, "auto", Timer(), 1.0).step()
    ours, moved = case.offloaded(tokens, Timer(), None).step()
    clipped = case.offloaded(tokens, PassTimer(), 1.0)
    ours_clipped, moved_clipped = clipped.step()
    update, moved_update = clipped.update()
    alone = drive_alone(case.folder, max(int(moved), 256 * MIB), 12 * MIB)
    for name, value in {
        "memory": seconds,
        "memory, clipped": clipped_seconds,
        "ours": ours,
        "ours, clipped": ours_clipped,
        "bytes": moved,
        "bytes, clipped": moved_clipped,
        "alone": alone,
        "speed": seconds / ours,
        "speed, clipped": clipped_seconds / ours_clipped,
        "bandwidth": moved / ours / alone,
        "optimizer": moved_update / update / alone,
        "model": max(seconds, moved / alone),
        "model, clipped": max(clipped_seconds, (moved_clipped - moved_update) / alone)
        + moved_update / alone,
    }.items():
        found[name].append(value)
    for suffix in ("", ", clipped"):
        model, ours = found[f"model{suffix}"][-1], found[f"ours{suffix}"][-1]
        found[f"predicted{suffix}"].append(model / ours)


def cell(values: list[float], scale: float = 1, digits: int = 0) -> str:
    low, middle, high = (scale * f(values) for f in (min, median, max))
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def show(found: dict[int, Figures]) -> None:
    for suffix in ("", ", clipped"):
        print(f"\n{'clipped' if suffix else 'unclipped'}; median [min, max] of the repeats")
        print("| tokens | in memory, ms | ours, ms | MB moved | drive alone, MB/s | predicted |")
        print("|---:|---|---|---:|---|---|")
        for tokens, figures in found.items():
            cells = [
                cell(figures[f"memory{suffix}"], 1e3),
                cell(figures[f"ours{suffix}"], 1e3),
                f"{median(figures[f'bytes{suffix}']) / 1e6:.0f}",
                cell(figures["alone"], 1e-6),
                cell(figures[f"predicted{suffix}"], 1, 2),
            ]
            print(f"| {tokens} | {' | '.join(cells)} |")
    least, most = min(found), max(found)
    print(
        f"\nat {least} tokens, of the drive alone:", cell(found[least]["bandwidth"], 1, 2), end=""
    )
    print(" (bar 0.6); optimizer pass", cell(found[least]["optimizer"], 1, 2), "(bar 0.8)")
    worst = max(
        abs(median(figures[name]) - 1)
        for figures in found.values()
        for name in ("predicted", "predicted, clipped")
    )
    print(f"predicted step time: largest difference {100 * worst:.0f} % (bar 25 %)")
    for suffix, bar in (("", 0.85), (", clipped", 0.75)):
        speeds = cell(found[most][f"speed{suffix}"], 1, 3)
        print(f"speed of training in memory at {most} tokens{suffix}: {speeds} (bar {bar})")


def draw(found: dict[int, Figures], file: Path) -> None:
    """Step time, and what is left of the speed in memory, against tokens."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    tokens = list(found)
    for suffix, color in (("", "tab:blue"), (", clipped", "tab:orange")):
        ours = [median(found[count][f"ours{suffix}"]) for count in tokens]
        memory = [median(found[count][f"memory{suffix}"]) for count in tokens]
        model = [median(found[count][f"model{suffix}"]) for count in tokens]
        left.plot(tokens, ours, "o-", color=color, label=f"zero_infinity{suffix}")
        left.plot(tokens, model, ":", color=color, label=f"predicted{suffix}")
        speeds = [found[count][f"speed{suffix}"] for count in tokens]
        right.plot(tokens, [median(values) for values in speeds], "o-", color=color)
        low, high = ([f(values) for values in speeds] for f in (min, max))
        right.fill_between(tokens, low, high, color=color, alpha=0.2)
        if not suffix:
            left.plot(tokens, memory, "k-", linewidth=1, label="in memory")
    left.set(xlabel="tokens a step", ylabel="seconds a step", xscale="log", yscale="log")
    left.legend(fontsize=8)
    right.set(xlabel="tokens a step", ylabel="speed of training in memory", xscale="log")
    right.set_ylim(0, 1.1)
    for axes in (left, right):
        axes.set_xticks(tokens, labels=[str(count) for count in tokens])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="2 M parameters, two token counts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--folder", type=Path, help="on the drive to measure")
    parser.add_argument("--plot", type=Path, help="a picture of it")
    arguments = parser.parse_args()
    quiet()
    start, moved = time.perf_counter(), sum(moved_bytes())
    print(
        f"torch {torch.__version__}, lightning {lightning.__version__}, {hardware()}, "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    folder = tempfile.mkdtemp(prefix="zero_infinity_", dir=arguments.folder)
    width, blocks = (128, 8) if arguments.small else (512, 8)
    tokens = [32, 128] if arguments.small else arguments.tokens
    case = Case(width, blocks, arguments.steps, folder)
    found: dict[int, Figures] = {count: defaultdict(list) for count in tokens}
    try:
        for _ in range(1 if arguments.small else arguments.repeats):
            for count in tokens:
                repeat(case, count, found[count])
    finally:
        shutil.rmtree(folder)
    show(found)
    if arguments.plot:
        draw(found, arguments.plot)
    print(f"{time.perf_counter() - start:.0f} s, {(sum(moved_bytes()) - moved) / 1e9:.1f} GB moved")


if __name__ == "__main__":
    main()
