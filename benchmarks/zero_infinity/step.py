"""Speed of zero_infinity against the same training in memory, from I/O- to compute-bound steps.

    python benchmarks/zero_infinity/step.py          # 25 minutes, 1 GB of disk, 330 GB of traffic
    python benchmarks/zero_infinity/step.py --small  # a minute: does it run

A Llama with 8 blocks of width 512 (26 M parameters), AdamW (fused), PretrainModule in a Trainer,
one compute thread. In each repeat, for each number of tokens: the same run in memory, then under
zero_infinity, unclipped (blocks are updated in backward) and clipped (gradients wait on disk, and
blocks are updated in the next forward), then the drive alone, by the same threads in pieces of the
same size: reads, writes, and both in the proportions of an unclipped step, made durable. A step is
from one batch's start to the next one's, the commit included; the median of a run's steps counts,
without the first two. At the smallest number of tokens also with atomic_step=False, and the
optimizer pass of a clipped step by itself, with nothing computed beside it.

zero_infinity has glibc map allocations from 256 KiB on, for the rest of the process; each run in
memory gets thresholds back that those of a process without it come to.

Predicted is what lightning_align.offload.bandwidth says, from nothing but the sizes of blocks, the
rates of the drive alone, the seconds that forward, backward and the rest of a step take in memory,
and what memory costs that is touched for the first time (each gradient of a block is, here), all of
the same repeat.

Bars: speed of training in memory at the largest number of tokens 0.85, clipped 0.75; at the
smallest, bandwidth 0.6 of the drive's alone; of the optimizer pass 0.8; an atomic step at most 1.15
of one in place; predicted within 25 %.
"""

import argparse
import contextlib
import ctypes
import mmap
import shutil
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from memory import VOCABULARY, llama, quiet, told
from torch.utils.data import DataLoader

from lightning_align import PretrainModule
from lightning_align.offload.bandwidth import (
    BACKWARD,
    FORWARD,
    UPDATE,
    Bandwidth,
    StepLayout,
    fresh_memory_s,
    step_bytes,
    step_s,
)
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import DirectFile, Threads
from lightning_align.offload.traffic import Event
from lightning_align.reports.step_timeline import timeline
from lightning_align.strategies import ZeROInfinityStrategy
from lightning_align.strategies.zero_infinity.counters import layout_of

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


class PhaseTimer(Timer):
    """Also when forward, backward and the update ended. Its hooks see gradients: in memory only."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[list[float]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        super().on_train_batch_start(trainer)
        self._ends(new=True)

    def on_before_backward(self, *_: Any) -> None:
        self._ends()

    def on_after_backward(self, *_: Any) -> None:
        self._ends()

    def _ends(self, new: bool = False) -> None:
        if self.phases:
            self.phases[-1].append(time.perf_counter())
        if new:
            self.phases.append([time.perf_counter()])

    def compute(self) -> dict[str, float]:
        """Median seconds of each phase of a step."""
        steps = self.phases[2:-1]
        found = [median(ends[i + 1] - ends[i] for ends in steps) for i in range(3)]
        return dict(zip((FORWARD, BACKWARD, UPDATE), found, strict=True))


class PassTimer(Timer):
    """Also the optimizer pass by itself, of updates that would wait for the next forward."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[tuple[float, int]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        super().on_train_batch_start(trainer)
        engine = trainer.strategy._engine
        engine.store.settle_all()
        start, moved = time.perf_counter(), _moved(trainer)
        engine.updates.late.finish()
        engine.store.settle_all()
        self.passes.append((time.perf_counter() - start, _moved(trainer) - moved))

    def update(self) -> tuple[float, float]:
        """Median seconds and bytes of the pass."""
        seconds, moved = zip(*self.passes[2:], strict=True)
        return median(seconds), median(moved)


class Recorder(pl.Callback):
    """The events of the last step but one."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        traffic = trainer.strategy._engine.threads.traffic
        if trainer.global_step == trainer.max_steps - 1:
            self.events = traffic.recorded()
        elif trainer.global_step == trainer.max_steps - 2:
            traffic.record()


def _moved(trainer: Any) -> int:
    engine = getattr(trainer.strategy, "_engine", None)
    return engine.threads.traffic.read + engine.threads.traffic.written if engine else 0


def batches(tokens: int, steps: int) -> DataLoader[Any]:
    rows, length = max(1, tokens // SEQUENCE), min(tokens, SEQUENCE)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (steps, rows, length + 1), generator=generator)
    return DataLoader([{"input_ids": x, "labels": x} for x in ids], batch_size=None)


def allocate_as(*, offloaded: bool) -> None:
    """Let glibc keep what is freed as it does in a process of that side alone."""
    library: Any = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        trim, mapped = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD; the strategy sets its own
        library.mallopt(trim, 128 << 10 if offloaded else 64 * MIB)
        library.mallopt(mapped, 128 << 10 if offloaded else 32 * MIB)
        library.malloc_trim(0)


@dataclass(frozen=True)
class Case:
    """What all sides train."""

    width: int
    blocks: int
    steps: int
    folder: str

    def train(self, tokens: int, strategy: Any, watch: Any, clip: float | None) -> Any:
        if strategy == "auto":
            allocate_as(offloaded=False)
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
            callbacks=[watch],
        )
        trainer.fit(module, batches(tokens, self.steps))
        return watch

    def offloaded(
        self, tokens: int, watch: Any, clip: float | None, **arguments: Any
    ) -> tuple[Any, StepLayout]:
        """A run, and what the model is told of it."""
        path = Path(self.folder, "nvme")
        allocate_as(offloaded=True)
        strategy = ZeROInfinityStrategy(nvme_path=str(path), overwrite=True, **arguments)
        try:
            self.train(tokens, strategy, watch, clip)
            assert strategy._engine is not None
            return watch, layout_of(strategy._engine, 1, gradients_wait=clip is not None)
        finally:
            strategy.close()
            shutil.rmtree(path)


class Drive:
    """Two files on the drive, read and written as a store does it."""

    def __init__(self, folder: str, nbytes: int, piece: int = 12 * MIB) -> None:
        self.piece, self.count = piece, max(1, nbytes // piece)
        self.threads = Threads()
        self.files = [DirectFile(Path(folder, f"alone{i}"), self.threads) for i in (0, 1)]
        pool = BufferPool()
        self.memories = [pool.take(piece).zero_() for _ in range(4)]
        for file in self.files:
            file.allocate(self.count * piece)
        self.rate(read=False, write=True, file=0)
        self.rate(read=False, write=True)

    def rate(self, *, read: bool, write: bool, file: int = 1) -> float:
        """Bytes a second, durable at the end; of both, 4 are read where 3 are written."""
        start, done = time.perf_counter(), 0
        under_way: list[Any] = []
        for number in range(self.count):
            place = number * self.piece
            if read:
                under_way.append(self.files[0].read(self.memories[number % 2], place))
                done += self.piece
            if write and not (read and number % 4 == 3):
                under_way.append(self.files[file].write(self.memories[2 + number % 2], place))
                done += self.piece
            while len(under_way) > 3:
                under_way.pop(0).wait()
        for transfer in under_way:
            transfer.wait()
        if write:
            self.files[file].sync().wait()
        return done / (time.perf_counter() - start)

    def close(self) -> None:
        for file in self.files:
            file.close()
            file.path.unlink()
        self.threads.close()


def drive_alone(folder: str, nbytes: int) -> tuple[Bandwidth, float]:
    """Of reads, of writes, and of both together."""
    drive = Drive(folder, nbytes)
    try:
        rates = Bandwidth(drive.rate(read=True, write=False), drive.rate(read=False, write=True))
        return rates, drive.rate(read=True, write=True)
    finally:
        drive.close()


def fresh_rate(nbytes: int = 4 * MIB, count: int = 16) -> float:
    """Bytes a second of memory that is touched for the first time, beside what writing it takes."""
    first = again = 0.0
    for _ in range(count):
        with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            marks = [time.perf_counter()]
            for _ in range(2):
                ctypes.memset(address, 1, nbytes)
                marks.append(time.perf_counter())
        first, again = first + marks[1] - marks[0], again + marks[2] - marks[1]
    return nbytes * count / max(first - again, 1e-9)


Figures = dict[str, list[float]]


def repeat(case: Case, tokens: int, found: Figures, *, smallest: bool) -> None:
    """One of each side, one after the other."""
    runs = {"": None, ", clipped": 1.0}
    for suffix, clip in runs.items():
        memory = case.train(tokens, "auto", PhaseTimer(), clip)
        seconds, compute = memory.step()[0], memory.compute()
        timer, layout = case.offloaded(tokens, Timer(), clip)
        ours, nbytes = timer.step()
        # Where updates are done: inside backward, or in the next forward.
        updates = FORWARD if clip else BACKWARD
        compute = {**compute, updates: compute[updates] + compute[UPDATE], UPDATE: 0.0}
        compute[BACKWARD] += fresh_memory_s(layout, fresh_rate())
        rates, alone = drive_alone(case.folder, max(int(nbytes / 2), 128 * MIB))
        predicted = step_s(step_bytes(layout), compute, rates)
        for name, value in {
            "memory": seconds,
            "ours": ours,
            "bytes": nbytes,
            "speed": seconds / ours,
            "bandwidth": nbytes / ours / alone,
            "model": predicted,
            "predicted": predicted / ours,
        }.items():
            found[f"{name}{suffix}"].append(value)
        for name, value in {"read": rates.read, "write": rates.write, "alone": alone}.items():
            found[name].append(value)
        if not smallest:
            continue
        if clip:
            update, moved = case.offloaded(tokens, PassTimer(), clip)[0].update()
            found["optimizer"].append(moved / update / alone)
        else:
            placed = case.offloaded(tokens, Timer(), None, atomic_step=False)[0].step()[0]
            found["atomic"].append(ours / placed)


def cell(values: list[float], scale: float = 1, digits: int = 0) -> str:
    low, middle, high = (scale * f(values) for f in (min, median, max))
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def show(found: dict[int, Figures]) -> None:
    for suffix in ("", ", clipped"):
        print(f"\n{'clipped' if suffix else 'unclipped'}; median [min, max] of the repeats")
        print("| tokens | in memory, ms | ours, ms | MB moved | predicted / ours |")
        print("|---:|---|---|---:|---|")
        for tokens, figures in found.items():
            cells = [
                cell(figures[f"memory{suffix}"], 1e3),
                cell(figures[f"ours{suffix}"], 1e3),
                f"{median(figures[f'bytes{suffix}']) / 1e6:.0f}",
                cell(figures[f"predicted{suffix}"], 1, 2),
            ]
            print(f"| {tokens} | {' | '.join(cells)} |")
    least, most = min(found), max(found)
    rates = (
        f"{name} {cell([v for f in found.values() for v in f[key]], 1e-6)}"
        for name, key in (("read", "read"), ("write", "write"), ("mixed", "alone"))
    )
    print(f"\ndrive alone, MB/s: {', '.join(rates)}", end="")
    print(
        f"\nat {least} tokens, of the drive alone:", cell(found[least]["bandwidth"], 1, 2), end=""
    )
    print(" (bar 0.6); optimizer pass", cell(found[least]["optimizer"], 1, 2), "(bar 0.8)")
    print(f"an atomic step over one in place: {cell(found[least]['atomic'], 1, 2)} (bar 1.15)")
    worst = max(
        abs(median(figures[name]) - 1)
        for figures in found.values()
        for name in ("predicted", "predicted, clipped")
    )
    print(f"predicted step time: largest difference {100 * worst:.0f} % (bar 25 %)")
    for suffix, bar in (("", 0.85), (", clipped", 0.75)):
        speeds = cell(found[most][f"speed{suffix}"], 1, 3)
        print(f"speed of training in memory at {most} tokens{suffix}: {speeds} (bar {bar})")


def draw_timelines(case: Case, tokens: int, folder: Path) -> None:
    """A step that updates in backward and one whose gradients wait."""
    for name, clip in (("early", None), ("clipped", 1.0)):
        events = case.offloaded(tokens, Recorder(), clip)[0].events
        figure = timeline(events, f"{tokens} tokens, {name}")
        figure.savefig(folder / f"zero_infinity_timeline_{name}.png", dpi=120)


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
    parser.add_argument("--plot", type=Path, help="folder for pictures of it")
    arguments = parser.parse_args()
    quiet()
    folder = tempfile.mkdtemp(prefix="zero_infinity_", dir=arguments.folder)
    width, blocks = (128, 8) if arguments.small else (512, 8)
    tokens = [32, 128] if arguments.small else arguments.tokens
    case = Case(width, blocks, arguments.steps, folder)
    found: dict[int, Figures] = {count: defaultdict(list) for count in tokens}
    with told(), contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        for _ in range(1 if arguments.small else arguments.repeats):
            for count in tokens:
                repeat(case, count, found[count], smallest=count == min(tokens))
        show(found)
        if arguments.plot:
            draw(found, arguments.plot / "zero_infinity_step.png")
            draw_timelines(case, tokens[len(tokens) // 2 - 1], arguments.plot)


if __name__ == "__main__":
    main()
