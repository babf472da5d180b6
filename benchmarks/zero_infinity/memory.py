"""States over peak memory, and bytes moved, of strategy="zero_infinity" on real text under a limit.

    python benchmarks/zero_infinity/memory.py          # 10 minutes, 7 GB of disk, 242 M parameters
    python benchmarks/zero_infinity/memory.py --small  # a minute, 0.3 GB, 7 M parameters

A Llama with 34 blocks of width 768 learns "Pride and Prejudice" with AdamW under the string's
defaults and with activation checkpointing (34 blocks keep 0.6 GB of activations otherwise), each
run in a process of its own: plain, where blocks are updated inside backward, and with clipping,
where gradients wait on disk for their norm. The text was tokenised by an earlier process.

Limit: 1 GB for the whole process, page cache included, by a memory cgroup; where none can be made,
RLIMIT_DATA. The values of the model are built in memory, so the limit comes into force when
training begins (--limit-from start: with the process), and that peak is told apart.

States are weights, and AdamW's two moments: 12 bytes a parameter. Peak: VmHWM from the first
training step on, whole, and without what the imports alone take.

Bytes of a step: median over steps without validation, by our counters, by the kernel's
(/proc/self/io) and by the formula for N parameters in L blocks, B of them in memory, M parameters
in no block: 4 bytes of each parameter of a block for forward and for backward but for the B blocks
that are there when their phase begins; 8 bytes of moments read, 12 written, also for M; clipped,
4 bytes of gradients written and read.

Bars: states over peak 4, net of imports 8; counters within 2 % of the kernel's and 5 % of the
formula.
"""

import argparse
import contextlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

SIZES = {  # width, blocks, tokens a step
    "full": (768, 34, 128),
    "small": (256, 8, 128),
}
VOCABULARY = 2048
RUNS: dict[str, dict[str, Any]] = {"plain": {}, "clipped": {"gradient_clip_val": 1.0}}
PREPARE = "prepare"


# What the kernel says


def status_bytes(key: str) -> int:
    """A size of this process: VmRSS is what is resident, VmHWM the most that ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def moved_bytes() -> tuple[int, int]:
    """Bytes that this process has made the disk read and write."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]), int(lines["write_bytes"])


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Around a script: what it runs on, and then what it took, its processes included."""
    import lightning
    import torch
    from hardware import hardware

    start, moved = time.perf_counter(), sum(moved_bytes())
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, {hardware()}", end="")
    print(f", load average {os.getloadavg()[0]:.1f}", flush=True)
    yield
    gigabytes = (sum(moved_bytes()) - moved) / 1e9
    print(f"{time.perf_counter() - start:.0f} s, {gigabytes:.1f} GB moved")


# A limit of memory


@contextlib.contextmanager
def memory_group() -> Iterator[Path | None]:
    """A memory cgroup for a child; None where we may not make one."""
    lines = [line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    names = {controllers: path.lstrip("/") for _, controllers, path in lines}
    roots = {"memory": Path("/sys/fs/cgroup/memory"), "": Path("/sys/fs/cgroup")}
    found = None
    for controller, root in roots.items():
        group = root / names.get(controller, "") / f"zero_infinity_{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            if any((group / name).exists() for name in ("memory.limit_in_bytes", "memory.max")):
                found = group
                break
            group.rmdir()
    try:
        yield found
    finally:
        if found is not None:
            found.rmdir()


def enter(group: Path | None) -> None:
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))


def enforce(group: Path | None, limit: int) -> str:
    """From now on, no more than that. Returns what enforces it."""
    if group is None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return "RLIMIT_DATA"
    for name in ("memory.limit_in_bytes", "memory.max"):
        if (group / name).exists():
            (group / name).write_text(str(limit))
            return "cgroup"
    raise AssertionError(group)


def group_events(group: Path | None) -> int | None:
    """How often the limit was met: the kernel then takes back page cache, or ends the process."""
    if group is None:
        return None
    if (group / "memory.failcnt").exists():
        return int((group / "memory.failcnt").read_text())
    events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
    return int(events["max"])


# One run, in a process of its own


def llama(width: int, blocks: int, vocabulary: int = VOCABULARY) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def quiet(threads: int = 1) -> None:
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)  # else Lightning takes all cores for a strategy's
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_align"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.disable(logging.WARNING)


def expected(engine: Any, clipped: bool) -> tuple[float, float]:
    """Bytes of a step, read and written, by the formula."""
    from lightning_align.offload.bandwidth import step_bytes, total
    from lightning_align.strategies.zero_infinity.counters import layout_of

    moved = total(step_bytes(layout_of(engine, 1, gradients_wait=clipped)))
    return moved.read, moved.written


def novel(tokens: int, folder: str) -> Any:
    from lightning_align import TextDataModule

    return TextDataModule(
        "pride_and_prejudice",
        vocab_size=VOCABULARY,
        block_size=128,
        batch_size=tokens // 128,
        cache_dir=Path(folder, "cache"),
    )


def child(arguments: argparse.Namespace) -> None:
    group = Path(arguments.group) if arguments.group else None
    enter(group)
    from functools import partial

    import lightning.pytorch as pl
    import torch

    from lightning_align import PretrainModule
    from lightning_align.strategies import ZeROInfinityStrategy

    width, blocks, tokens = SIZES[arguments.size]
    quiet(arguments.threads)
    llama(64, 1)  # imports what building one imports
    imports = status_bytes("VmRSS")
    enforced_by = enforce(group, arguments.limit) if arguments.limit_from == "start" else ""

    class Watch(pl.Callback):
        """Peak and bytes of the steps."""

        def __init__(self) -> None:
            self.built = 0
            self.enforced_by = enforced_by
            self.marks: list[tuple[float, tuple[int, int], tuple[int, int]]] = []
            self.losses: list[float] = []
            self.validated: set[int] = set()  # steps that a validation follows

        def on_train_start(self, *_: Any) -> None:
            self.built = status_bytes("VmHWM")
            forget_peak()
            if not self.enforced_by:
                self.enforced_by = enforce(group, arguments.limit)

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            traffic = trainer.strategy._engine.threads.traffic
            mark = (time.perf_counter(), (traffic.read, traffic.written), moved_bytes())
            self.marks.append(mark)

        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            self.losses.append(float(trainer.callback_metrics["val_loss"]))
            self.validated.add(len(self.marks) - 1)

    watch = Watch()
    # The string's defaults; its class only for the folder.
    strategy = ZeROInfinityStrategy(nvme_path=str(Path(arguments.folder, "nvme")))
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_steps=arguments.steps,
        val_check_interval=max(2, arguments.steps // 4),
        limit_val_batches=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=arguments.folder,
        callbacks=[watch],
        **RUNS[arguments.run],
    )
    with trainer.init_module():  # built on disk, so that the limit may hold from the start
        torch.manual_seed(0)
        module = PretrainModule(
            llama(width, blocks),
            optimizer=partial(torch.optim.AdamW, lr=3e-4, fused=True),
            activation_checkpointing=True,
        )
    start = time.perf_counter()
    trainer.fit(module, novel(tokens, arguments.folder))
    engine: Any = strategy._engine
    # Optimizer states are there from the second step on. A validation does the updates that wait,
    # which are then missing in the step behind it.
    pairs = [
        pair
        for step, pair in enumerate(pairwise(watch.marks))
        if step > 1 and not {step - 1, step} & watch.validated
    ]
    parameters = sum(p.numel() for p in module.parameters())
    print(
        json.dumps(
            {
                "parameters": parameters,
                "imports": imports,
                "built": watch.built,
                "peak": status_bytes("VmHWM"),
                "enforced_by": watch.enforced_by,
                "met": group_events(group),
                "step_s": median(b[0] - a[0] for a, b in pairs),
                "ours": [median(b[1][i] - a[1][i] for a, b in pairs) for i in (0, 1)],
                "kernel": [median(b[2][i] - a[2][i] for a, b in pairs) for i in (0, 1)],
                "formula": expected(engine, arguments.run == "clipped"),
                "losses": watch.losses,
                "disk": sum(
                    f.stat().st_blocks * 512 for f in Path(arguments.folder, "nvme").rglob("*")
                ),
                "fit_s": time.perf_counter() - start,
            }
        )
    )


# The report


def process(run: str, folder: str, group: Path | None, arguments: argparse.Namespace) -> str:
    """The last line that a run in a process of its own has printed."""
    options = {
        "run": run,
        "size": arguments.size,
        "steps": arguments.steps,
        "threads": arguments.threads,
        "limit": int(arguments.limit * 1e9),
        "limit-from": arguments.limit_from,
        "folder": folder,
        "group": group or "",
    }
    words = [f"--{key}={value}" for key, value in options.items()]
    done = subprocess.run(
        [sys.executable, __file__, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{run} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return (done.stdout.splitlines() or [""])[-1]


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    folder = tempfile.mkdtemp(prefix="zero_infinity_", dir=arguments.folder)
    try:
        process(PREPARE, folder, None, arguments)
        with memory_group() as group:
            found: dict[str, Any] = json.loads(process(name, folder, group, arguments))
    finally:
        shutil.rmtree(folder)
    return found


def show(name: str, found: dict[str, Any]) -> None:
    states, peak, imports = 12 * found["parameters"], found["peak"], found["imports"]
    print(
        f"\n{name}: {found['parameters'] / 1e6:.0f} M parameters, states {states / 1e6:,.0f} MB, "
        f"disk {found['disk'] / 1e9:.2f} GB; {found['step_s']:.2f} s a step, {found['fit_s']:.0f} s"
    )
    met = "" if found["met"] is None else f", met {found['met']} times"
    print(f"  limit by {found['enforced_by']}{met}")
    print(
        f"  resident MB: imports {imports / 1e6:.0f}, peak of building and storing "
        f"{found['built'] / 1e6:.0f}, peak of training {peak / 1e6:.0f}"
    )
    print(f"  {'MB a step':<10} {'ours':>10} {'kernel':>10} {'formula':>10}")
    for i, what in enumerate(("read", "written")):
        values = [found[key][i] / 1e6 for key in ("ours", "kernel", "formula")]
        print(f"  {what:<10} {values[0]:>10.1f} {values[1]:>10.1f} {values[2]:>10.1f}")
    total = {key: sum(found[key]) for key in ("ours", "kernel", "formula")}
    rate = total["ours"] / found["step_s"] / 1e6
    bytes_ = total["ours"] / found["parameters"]
    print(f"  {bytes_:.1f} bytes a parameter and step, {rate:,.0f} MB/s over the whole step")
    losses = ", ".join(f"{loss:.3f}" for loss in found["losses"])
    print(f"  validation loss: {losses} (falls: {found['losses'][-1] < found['losses'][0]})")
    print(
        f"  ours / kernel = {total['ours'] / total['kernel']:.4f} (bar 1 +- 0.02), "
        f"ours / formula = {total['ours'] / total['formula']:.4f} (bar 1 +- 0.05)"
    )
    print(
        f"  states / peak = {states / peak:.2f} (bar 4), "
        f"net of imports {states / max(peak - imports, 1):.2f} (bar 8)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="8 M parameters: does it run")
    parser.add_argument("--steps", type=int, default=24, help="at least 6")
    parser.add_argument("--limit", type=float, default=1.0, help="GB")
    parser.add_argument("--limit-from", choices=("training", "start"), default="training")
    parser.add_argument("--threads", type=int, default=1, help="that compute")
    parser.add_argument("--folder", type=Path, help="on the drive to measure")
    parser.add_argument("--run", choices=(*RUNS, PREPARE), help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--group", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run == PREPARE:
        novel(SIZES[arguments.size][2], arguments.folder).prepare_data()
        return
    if arguments.run:
        arguments.limit = int(arguments.limit)
        child(arguments)
        return
    import torch
    from hardware import hardware

    arguments.size = "small" if arguments.small else "full"
    start = time.perf_counter()
    print(f"torch {torch.__version__}, {hardware()}, {arguments.limit} GB, {arguments.steps} steps")
    print(f"load average {os.getloadavg()[0]:.1f}")
    for name in RUNS:
        show(name, run(name, arguments))
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
