"""How long a save keeps the training thread, what it does to training meanwhile, and to memory.

    python benchmarks/checkpoint/blocking.py             # about 10 minutes, 1.5 GB of disk
    python benchmarks/checkpoint/blocking.py --streaming # the same, see below
    python benchmarks/checkpoint/blocking.py --small     # a minute: does it run

Sides, one after the other in each round, in one process: SnapshotEngine; one memcpy of the same
bytes into memory that is already there (as one block, where the C library may go over to streaming
stores, and tensor by tensor); ``state_dict()`` without any save; Lightning's AsyncCheckpointIO;
torch's DCP ``async_save`` in a thread with a stager that is used again (the fastest of its
documented ways without CUDA); Lightning's TorchCheckpointIO, which is synchronous and does not
fsync.

States: a few large tensors, the AdamW state of a Llama, many tensors of 1 to 4 kB.

Blocking: from before ``state_dict()`` to the return of the save, wall time and CPU time of the
thread. Each save is written out before the next side's begins, so nobody waits for an earlier one;
the first save of each side (allocation) is not counted, and each round begins with another side.
Slowdown: time of a matrix product while a save is being written over that without one. Memory:
highest resident size over that before the first save, each side in a process of its own.

glibc writes past the cache (a third less traffic) from a size on that it takes from the L3 cache: a
few MB on most machines, but 192 MB on virtual ones that are told the cache of the whole host. There
a single memcpy of the state streams, and copying tensor by tensor does not. --streaming sets the
limit to 2 MB for all sides: GLIBC_TUNABLES=glibc.cpu.x86_non_temporal_threshold=0x200000.

Bars: at most 1.2x one memcpy and 0.1x a synchronous save; on large tensors at most 0.6x
AsyncCheckpointIO and 0.7x DCP; on many small ones at most 1.2x the better of these.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_align.checkpointing import SnapshotEngine

TUNABLE = "glibc.cpu.x86_non_temporal_threshold=0x200000"

State = Callable[[], dict[str, Any]]


def few_large(scale: float) -> State:
    tensors = {f"layer{i}.weight": torch.randn(int(scale * 2**25)) for i in range(3)}  # 128 MB each
    return lambda: {"state_dict": {name: tensor.detach() for name, tensor in tensors.items()}}


def adamw_llama(scale: float) -> State:
    width = 64 * max(1, int(6 * scale**0.5))
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=6,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    return lambda: {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}


def many_small(scale: float) -> State:
    sizes = np.random.default_rng(0).integers(256, 1025, int(20_000 * scale))  # 1 to 4 kB
    tensors = {f"tensor{i}": torch.randn(int(size)) for i, size in enumerate(sizes)}
    return lambda: {"state_dict": {name: tensor.detach() for name, tensor in tensors.items()}}


STATES = {"few large": few_large, "AdamW of a Llama": adamw_llama, "many small": many_small}


def tensors_of(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state
    nested = isinstance(state, (dict, list, tuple))
    return [tensor for value in values for tensor in tensors_of(value)] if nested else []


class Ours:
    """SnapshotEngine, one checkpoint kept."""

    def __init__(self, folder: Path, state: State) -> None:
        self.state, self.number = state, 0
        self.engine = SnapshotEngine(folder)

    def save(self) -> None:
        self.number += 1
        self.engine.save(self.state(), f"save{self.number}", self.number)
        if self.number > 1:
            self.engine.delete(f"save{self.number - 1}")

    def is_done(self) -> bool:
        return self.engine.wait(0)

    def finish(self) -> None:
        assert self.engine.wait()
        assert not self.engine.pop_errors()


class Memcpy:
    """One contiguous block into another."""

    def __init__(self, _: Path, state: State) -> None:
        size = sum(tensor.nbytes for tensor in tensors_of(state()))
        self.source, self.target = np.ones(size, np.uint8), np.ones(size, np.uint8)

    def save(self) -> None:
        np.copyto(self.target, self.source)

    def is_done(self) -> bool:
        return True

    def finish(self) -> None:
        pass


class MemcpyEach(Memcpy):
    """The same, but a call for each tensor, from where it is: no long streaming store."""

    def __init__(self, _: Path, state: State) -> None:
        self.tensors = tensors_of(state())
        self.target = np.ones(sum(tensor.nbytes for tensor in self.tensors), np.uint8)
        places = [int(tensor.nbytes) for tensor in self.tensors]
        starts = self.target.ctypes.data + np.cumsum([0, *places[:-1]])
        sources = [tensor.data_ptr() for tensor in self.tensors]
        self.calls = list(zip(starts.tolist(), sources, places, strict=True))

    def save(self) -> None:
        for call in self.calls:
            ctypes.memmove(*call)


class Nothing(Memcpy):
    """``state_dict()`` alone, which is inside every other side but the copies."""

    def __init__(self, _: Path, state: State) -> None:
        self.save = state  # type: ignore[assignment]


class Lightning:
    """AsyncCheckpointIO."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder, self.state = folder, state
        self.io = AsyncCheckpointIO(TorchCheckpointIO())
        self.behind: Future[None] | None = None

    def save(self) -> None:
        self.io.save_checkpoint(self.state(), self.folder / "async.ckpt")

    def is_done(self) -> bool:
        if self.behind is None:  # one thread: it is done when what is queued behind it is
            assert self.io._executor is not None
            self.behind = self.io._executor.submit(lambda: None)
        return self.behind.done()

    def finish(self) -> None:
        self.io.teardown()
        self.behind = None


class Distributed:
    """DCP async_save."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder, self.state, self.response = folder, state, None
        self.stager = DefaultStager(StagingOptions(False, False, False, False))

    def save(self) -> None:
        self.response = dcp.async_save(
            self.state(),
            checkpoint_id=self.folder / "dcp",
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
            async_stager=self.stager,
            no_dist=True,
        )

    def _future(self) -> Any:
        return getattr(self.response, "upload_completion", self.response)

    def is_done(self) -> bool:
        return bool(self._future().done())

    def finish(self) -> None:
        self._future().result()


class Synchronous:
    """TorchCheckpointIO."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder, self.state = folder, state
        self.io = TorchCheckpointIO()

    def save(self) -> None:
        self.io.save_checkpoint(self.state(), self.folder / "sync.ckpt")

    def is_done(self) -> bool:
        return True

    def finish(self) -> None:
        pass


SIDES = {
    "ours": Ours,
    "memcpy": Memcpy,
    "memcpy by tensor": MemcpyEach,
    "state_dict() alone": Nothing,
    "AsyncCheckpointIO": Lightning,
    "DCP async_save": Distributed,
    "synchronous": Synchronous,
}


def blocking(sides: dict[str, Any], rounds: int) -> dict[str, dict[str, list[float]]]:
    found = {name: {"wall": [], "cpu": []} for name in sides}
    for number in range(rounds + 1):
        order = list(sides.items())
        for name, side in order[number % len(order) :] + order[: number % len(order)]:
            gc.collect()
            os.sync()  # else the files that the side before did not sync are written meanwhile
            wall, cpu = time.perf_counter(), time.thread_time()
            side.save()
            wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
            side.finish()
            if number:
                found[name]["wall"].append(wall)
                found[name]["cpu"].append(cpu)
    return found


def slowdown(side: Any, seconds: float) -> tuple[float, float]:
    """Time of a product while a save is being written over that without, and seconds to write."""
    matrix = torch.randn(384, 384)

    def products(until: Callable[[], bool]) -> tuple[int, float]:
        start, count = time.perf_counter(), 0
        while not until() or count < 3:
            matrix @ matrix
            count += 1
        return count, time.perf_counter() - start

    end = time.perf_counter() + seconds
    count, idle = products(lambda: time.perf_counter() > end)
    alone = idle / count
    side.save()
    count, busy = products(side.is_done)
    side.finish()
    return busy / count / alone, busy


def peak_memory(side: str, state: str, scale: float) -> float:
    """Peak resident MB over what the state itself takes, measured by a process of its own."""
    command = [sys.executable, __file__, "--memory", side, "--state", state, "--scale", str(scale)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_resident_kb() -> int:
    """Of this process alone: ``ru_maxrss`` begins with that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure_memory(side: str, state: str, scale: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make = STATES[state](scale)
        gc.collect()
        before = peak_resident_kb()
        running = SIDES[side](Path(folder), make)
        for _ in range(3):
            running.save()
            running.finish()
        after = peak_resident_kb()
    print(json.dumps((after - before) / 1024))


def show(state: str, bytes_: int, found: dict[str, dict[str, list[float]]]) -> None:
    print(f"\n{state}: {bytes_ / 1e6:.0f} MB")
    print(f"  {'ms':<18} {'wall median':>12} {'min':>8} {'max':>8} {'CPU median':>12} {'min':>8}")
    for name, times in found.items():
        wall, cpu = ([1000 * value for value in times[kind]] for kind in ("wall", "cpu"))
        figures = (statistics.median(wall), min(wall), max(wall), statistics.median(cpu), min(cpu))
        print("  {:<18} {:>12.2f} {:>8.2f} {:>8.2f} {:>12.2f} {:>8.2f}".format(name, *figures))
    peers = [name for name in found if name != "ours"]
    for label, kind, pick in (
        ("wall, median", "wall", statistics.median),
        ("wall, min", "wall", min),
        ("CPU, median", "cpu", statistics.median),
    ):
        ours = pick(found["ours"][kind])
        text = ", ".join(f"{ours / pick(found[name][kind]):.3f}x {name}" for name in peers)
        print(f"  ours ({label}): {text}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--streaming", action="store_true")
    parser.add_argument("--state", choices=STATES)
    parser.add_argument("--folder", type=Path, help="where to write; default a temporary folder")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.streaming and os.environ.get("GLIBC_TUNABLES") != TUNABLE:
        environment = {**os.environ, "GLIBC_TUNABLES": TUNABLE}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    scale = 0.05 if arguments.small else arguments.scale
    rounds = 2 if arguments.small else arguments.rounds
    if arguments.memory:
        measure_memory(arguments.memory, arguments.state, scale)
        return
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, {platform.machine()},")
    glibc = os.environ.get("GLIBC_TUNABLES", "glibc as it is")
    print(f"{os.cpu_count()} cores, one thread, {rounds} rounds, {glibc}")
    for state in [arguments.state] if arguments.state else STATES:
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            make = STATES[state](scale)
            sides = {}
            for name, side in SIDES.items():
                (folder / name).mkdir()
                sides[name] = side(folder / name, make)
            bytes_ = sum(tensor.nbytes for tensor in tensors_of(make()))
            show(state, bytes_, blocking(sides, rounds))
            print("  while it is written:")
            for name in ("ours", "AsyncCheckpointIO", "DCP async_save"):
                runs = [slowdown(sides[name], 0.3) for _ in range(min(rounds, 3))]
                ratio, seconds = (statistics.median(column) for column in zip(*runs, strict=True))
                print(f"    {name:<18} training {ratio:.2f}x slower for {seconds:.2f} s")
        finally:
            shutil.rmtree(folder)
        print("  peak memory over the state's own, MB:")
        for name in ("ours", "AsyncCheckpointIO", "DCP async_save", "synchronous"):
            print(f"    {name:<18} {peak_memory(name, state, scale):.0f}")


if __name__ == "__main__":
    main()
