"""The store of zero_infinity against DeepSpeed's aio_handle and fio: read, write with fdatasync.

    python benchmarks/zero_infinity/io.py            # 2 minutes, 3.3 GB of disk, 55 GB of traffic
    python benchmarks/zero_infinity/io.py --small    # seconds, 0.3 GB: does it run

Each round every side writes 512 MiB in 16 files and makes them durable, then reads them; the order
rotates, the first round is not counted, and ``sync`` runs before each. All go past the page cache.

Ours: ``ShardStore`` as the strategy uses it, with its commit: 16 blocks, two files for each.
DeepSpeed: aio_handle with tensors from ``new_cpu_locked_tensor``, its files made durable one after
the other by fdatasync; of the settings tried the one with the best sum of both times counts. It
needs deepspeed and a compiler: the first import of its operator builds it, which takes minutes.
fio: libaio, O_DIRECT, fdatasync at the end; glibc asks for huge pages for its buffers (the tunable
glibc.malloc.hugetlb, from glibc 2.35 on).
What is not installed is left out, and said.

Bar: 1.0 of DeepSpeed's bandwidth, read and write. MB/s; beside it what the kernel says was moved.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from memory import moved_bytes, told
from torch import nn

from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import Threads
from lightning_align.offload.store import ShardStore

FILES = 16
SETTINGS = (  # block size, queue depth, threads; the first is DeepSpeed's default of parameters
    (1 << 20, 8, 1),
    (1 << 20, 32, 2),
    (4 << 20, 8, 2),
    (8 << 20, 16, 4),
)


class Ours:
    """Blocks in a store, in memory of its pool."""

    def __init__(self, folder: Path, file_bytes: int) -> None:
        self.threads = Threads()
        names = [f"block {number}" for number in range(FILES)]
        blocks = [
            Block(name, {f"{name}.weight": nn.Parameter(torch.empty(file_bytes // 4))})
            for name in names
        ]
        self.store = ShardStore(folder, blocks, self.threads)
        self.store.allocate({})
        pool = BufferPool()
        self.memories = {name: pool.take(file_bytes) for name in names}
        for memory in self.memories.values():
            memory.fill_(7)
        self.step = 0

    def write(self) -> None:
        for name, memory in self.memories.items():
            self.store.write(name, memory)
            self.store.update_done(name)
        self.step += 1
        self.store.commit(self.step, b"")

    def read(self) -> None:
        for transfer in [self.store.read(name, memory) for name, memory in self.memories.items()]:
            transfer.wait()

    def close(self) -> None:
        self.store.close()
        self.threads.close()


class Aio:
    """DeepSpeed's handle, with locked tensors."""

    def __init__(self, module: Any, setting: tuple[int, int, int], folder: Path, size: int) -> None:
        block_size, depth, threads = setting
        self.handle = module.aio_handle(block_size, depth, False, True, threads)
        example = torch.empty(0, dtype=torch.uint8)
        self.tensors = {
            str(folder / f"{number}"): self.handle.new_cpu_locked_tensor(size, example)
            for number in range(FILES)
        }
        for tensor in self.tensors.values():
            tensor.fill_(7)

    def write(self) -> None:
        for path, tensor in self.tensors.items():
            self.handle.async_pwrite(tensor, path, 0)
        self.handle.wait()
        for path in self.tensors:
            descriptor = os.open(path, os.O_RDWR)
            os.fdatasync(descriptor)
            os.close(descriptor)

    def read(self) -> None:
        for path, tensor in self.tensors.items():
            self.handle.async_pread(tensor, path, 0)
        self.handle.wait()

    def close(self) -> None:
        for tensor in self.tensors.values():
            self.handle.free_cpu_locked_tensor(tensor)


class Fio:
    """fio's own time of one job: starting it is not counted."""

    def __init__(self, folder: Path, file_bytes: int) -> None:
        self.options = [
            *("--name=x", f"--directory={folder}", f"--nrfiles={FILES}", "--output-format=json"),
            *(f"--size={FILES * file_bytes}", "--ioengine=libaio", "--direct=1", "--iomem=malloc"),
            *(f"--bs={min(4 << 20, file_bytes)}", "--iodepth=8", "--fallocate=posix"),
            "--file_service_type=sequential",
        ]

    def _run(self, *more: str) -> float:
        command = ["fio", *self.options, *more]
        pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        options = {"check": True, "capture_output": True, "text": True}
        done = subprocess.run(command, env={**os.environ, **pages}, **options)
        job = json.loads(done.stdout)["jobs"][0]
        return float(job["job_runtime"]) / 1e3

    def write(self) -> float:
        return self._run("--rw=write", "--end_fsync=1", "--overwrite=1")

    def read(self) -> float:
        return self._run("--rw=read")

    def close(self) -> None:
        pass


def aio_module() -> Any:
    """DeepSpeed's operator, or None with the reason told."""
    try:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        return AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # whatever a compiler says
        print(
            f"DeepSpeed's aio is left out: {str(error).splitlines()[0] if str(error) else error!r}"
        )
        return None


def timed(action: Callable[[], float | None]) -> tuple[float, int, int]:
    """Seconds, and bytes that the kernel says this process has read and written."""
    os.sync()
    before, start = moved_bytes(), time.perf_counter()
    said = action()
    seconds = time.perf_counter() - start
    after = moved_bytes()
    return said or seconds, after[0] - before[0], after[1] - before[1]


def measure(sides: dict[str, Any], rounds: int) -> dict[str, list[tuple[Any, Any]]]:
    """Side -> (write, read) of each round."""
    found: dict[str, list[tuple[Any, Any]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        order = list(sides)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            pair = (timed(sides[name].write), timed(sides[name].read))
            if number:
                found[name].append(pair)
    return found


def best_aio(module: Any, folder: Path, size: int, rounds: int) -> tuple[int, int, int]:
    sides = {
        str(setting): Aio(module, setting, _made(folder / f"tried {number}"), size)
        for number, setting in enumerate(SETTINGS)
    }
    found = measure(sides, rounds)
    times = {
        name: sum(median(pair[i][0] for pair in pairs) for i in (0, 1))
        for name, pairs in found.items()
    }
    for side in sides.values():
        side.close()
    for number in range(len(SETTINGS)):
        shutil.rmtree(folder / f"tried {number}")
    print("DeepSpeed, seconds to write and read with (block size, queue depth, threads):")
    for name, seconds in times.items():
        print(f"  {name}: {seconds:.3f}")
    return next(
        setting for setting in SETTINGS if str(setting) == min(times, key=times.__getitem__)
    )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def show(found: dict[str, list[tuple[Any, Any]]], total: int) -> None:
    print(f"\n{total / 1e6:.0f} MB; MB/s of {len(next(iter(found.values())))} rounds")
    rates: dict[str, dict[str, float]] = {}
    for i, what in enumerate(("write + fdatasync", "read")):
        print(f"{what:<36} {'median':>8} {'min':>8} {'max':>8} {'kernel MB':>10}")
        for name, pairs in found.items():
            values = [total / pair[i][0] / 1e6 for pair in pairs]
            moved = median(pair[i][2 - i] for pair in pairs) / 1e6
            rates.setdefault(what, {})[name] = median(values)
            told = "" if name == "fio" else f"{moved:.0f}"
            figures = f"{median(values):>8.0f} {min(values):>8.0f} {max(values):>8.0f}"
            print(f"  {name:<34} {figures} {told:>10}")
    for what, medians in rates.items():
        for name in medians.keys() - {"ours"}:
            pairs = zip(found["ours"], found[name], strict=True)
            i = 0 if what.startswith("write") else 1
            ratio = median(theirs[i][0] / ours[i][0] for ours, theirs in pairs)
            bar = " (bar 1.0)" if name.startswith("DeepSpeed") else ""
            print(f"{what}: ours / {name} = {ratio:.2f}{bar}, median of the rounds' ratios")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="32 MiB and two rounds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="on the drive to measure")
    arguments = parser.parse_args()
    mib, rounds = (32, 2) if arguments.small else (arguments.mib, arguments.rounds)
    size = mib * (1 << 20) // FILES
    folder = Path(tempfile.mkdtemp(prefix="zero_infinity_", dir=arguments.folder))
    with told(), contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        sides: dict[str, Callable[[], Any]] = {"ours": partial(Ours, folder / "ours", size)}
        module = aio_module()
        if module is not None:
            setting = best_aio(module, folder, size, min(rounds, 3))
            name = f"DeepSpeed {setting}"
            sides[name] = partial(Aio, module, setting, _made(folder / "aio"), size)
        if shutil.which("fio"):
            sides["fio"] = partial(Fio, _made(folder / "fio"), size)
        else:
            print("fio is left out: it is not installed")
        made = {name: side() for name, side in sides.items()}
        show(measure(made, rounds), FILES * size)
        for side in made.values():
            side.close()


if __name__ == "__main__":
    main()
