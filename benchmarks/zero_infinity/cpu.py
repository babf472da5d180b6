"""Host memory as the tier: strategy="zero_infinity_cpu" beside FSDP2 with CPU offload.

    python benchmarks/zero_infinity/cpu.py              # 4 minutes, 26 M parameters
    python benchmarks/zero_infinity/cpu.py --small      # 20 s a repeat, 2 M: does it run
    python benchmarks/zero_infinity/cpu.py --ranks 2

The same Llama (8 blocks of width 512, random tokens) and AdamW (fused), one compute thread a rank,
nothing else in the step. FSDP2 is run by hand, without a Trainer: ``fully_shard`` for each block
and for the root with ``CPUOffloadPolicy(pin_memory=False)`` over gloo, once with
``reshard_after_forward`` and once without; the faster one of a repeat counts, and its memory. Ours
runs in a Trainer. In memory is plain torch, without either: what both are measured against.

Each run is a process of its own; sides alternate, and their order rotates. Time is the median step,
without the first two. Peak is VmHWM from the third step on, less what the imports take; of 2 ranks
that of rank 0. Ratios are of each repeat: median, least and most.

Bars: throughput of ours over theirs 0.95 (aim 1.1), peak of theirs over ours 1.0 (aim 1.11).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from memory import VOCABULARY, forget_peak, llama, quiet, status_bytes, told

SIZES = {"full": (512, 8), "small": (128, 8)}  # width, blocks
SIDES = ("in memory", "ours", "reshard", "keep")
THEIRS = ("reshard", "keep")
WARM_UP = 2


class Watch:
    """Times of steps; the peak begins anew when all that a step needs is there."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def begin(self) -> None:
        if len(self.marks) == WARM_UP:
            forget_peak()
        self.marks.append((time.perf_counter(), time.process_time()))

    def report(self, imports: int, loss: float) -> None:
        peak = status_bytes("VmHWM") - imports
        self.marks.append((time.perf_counter(), time.process_time()))
        pairs = list(pairwise(self.marks))[WARM_UP:]
        step_s, cpu_s = (median(b[clock] - a[clock] for a, b in pairs) for clock in (0, 1))
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps({"step_s": step_s, "cpu_s": cpu_s, "peak": peak, "loss": loss}))


def batches(arguments: argparse.Namespace, steps: int) -> Any:
    import torch

    rank = int(os.environ.get("RANK", "0"))
    generator = torch.Generator().manual_seed(rank)
    rows, length = max(1, arguments.tokens // 256), min(arguments.tokens, 256)
    return torch.randint(VOCABULARY, (steps, rows, length), generator=generator)


def by_hand(arguments: argparse.Namespace, imports: int) -> None:
    import torch
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    torch.manual_seed(0)
    model = llama(*SIZES[arguments.size])
    if arguments.side in THEIRS:
        distributed.init_process_group("gloo")
        options = {
            "mesh": init_device_mesh("cpu", (distributed.get_world_size(),)),
            "offload_policy": CPUOffloadPolicy(pin_memory=False),
            "reshard_after_forward": arguments.side == "reshard",
        }
        for block in model.model.layers:
            fully_shard(block, **options)
        fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    watch, loss = Watch(), torch.zeros(())
    for ids in batches(arguments, arguments.steps):
        watch.begin()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.report(imports, float(loss.detach()))
    if distributed.is_initialized():
        distributed.destroy_process_group()


def ours(arguments: argparse.Namespace, imports: int) -> None:
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader

    import lightning_align  # noqa: F401

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = llama(*SIZES[arguments.size])
            self.watch, self.loss = Watch(), torch.zeros(())

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
            self.watch.begin()

        def training_step(self, ids: Any, _: int) -> Any:
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            self.loss = loss.detach()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)

    trainer = pl.Trainer(
        strategy="zero_infinity_cpu",
        accelerator="cpu",
        devices=arguments.ranks,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=arguments.folder,
    )
    module = Module()
    data = DataLoader(batches(arguments, arguments.steps), batch_size=None)
    trainer.fit(module, data)
    module.watch.report(imports, float(module.loss))


def child(arguments: argparse.Namespace) -> None:
    import lightning.pytorch  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401

    import lightning_align.strategies.zero_infinity.strategy  # noqa: F401

    quiet(1)
    llama(64, 1)  # imports what building one imports
    imports = status_bytes("VmRSS")
    ours(arguments, imports) if arguments.side == "ours" else by_hand(arguments, imports)


# The report


def run(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    folder = tempfile.mkdtemp(prefix="zero_infinity_")
    words = [f"--{key}={getattr(arguments, key)}" for key in ("size", "steps", "tokens", "ranks")]
    start = [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if arguments.ranks > 1 and side != "in memory":
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += [f"--nproc-per-node={arguments.ranks}"]
    elif side in THEIRS:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {**place, "RANK": "0", "WORLD_SIZE": "1"}
    try:
        done = subprocess.run(
            [*start, __file__, *words, f"--side={side}", f"--folder={folder}"],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
    finally:
        shutil.rmtree(folder)
    if done.returncode:
        sys.exit(f"{side} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    found: dict[str, float] = json.loads(line)
    return found


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def spread(values: list[float], digits: int = 2) -> str:
    low, middle, high = (f(values) for f in (min, median, max))
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def show(found: dict[str, list[dict[str, float]]]) -> None:
    print("| side | step, ms | of it CPU, ms | peak of the steps, MB | last loss |")
    print("|---|---|---|---|---:|")
    for side, runs in found.items():
        scales = {"step_s": 1e3, "cpu_s": 1e3, "peak": 1e-6}
        cells = [spread([run[key] * scale for run in runs], 0) for key, scale in scales.items()]
        print(f"| {side} | {' | '.join(cells)} | {runs[-1]['loss']:.5f} |")
    theirs = [
        min(runs, key=lambda run: run["step_s"])
        for runs in zip(*(found[side] for side in THEIRS), strict=True)
    ]
    ours, memory = found["ours"], found["in memory"]
    pairs = list(zip(theirs, ours, strict=True))
    alone = [m["step_s"] / o["step_s"] for m, o in zip(memory, ours, strict=True)]
    print(f"speed of ours over training in memory: {spread(alone)}")
    print(f"throughput over FSDP2: {spread([t['step_s'] / o['step_s'] for t, o in pairs])} (0.95)")
    print(f"peak of FSDP2 over ours: {spread([t['peak'] / o['peak'] for t, o in pairs])} (1.0)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="2 M parameters, one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of a rank's step")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, default="full", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        child(arguments)
        return
    if arguments.small:
        arguments.size, arguments.repeats = "small", 1
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with told():
        for repeat in range(arguments.repeats):
            turn = repeat % len(SIDES)
            for side in (*SIDES[turn:], *SIDES[:turn]):
                found[side].append(run(side, arguments))
        show(found)


if __name__ == "__main__":
    main()
