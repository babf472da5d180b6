"""ZeRO-Infinity as it was planned: resident memory, disk, bytes moved and seconds of a step.

    python benchmarks/planner/zero_infinity.py            # minutes on one core, 200 MB of disk
    python benchmarks/planner/zero_infinity.py --no-time  # all but seconds, on a busy machine
    python benchmarks/planner/zero_infinity.py --smoke    # two runs; the seconds mean nothing

The machine is measured (``HardwareSpec.measure``, with the drive), and the planner is calibrated on
steps in memory, of other sizes. Then each run of ``ZeROInfinityStrategy``, a process of its own, is
predicted and measured. Models are ``PretrainModule``'s on a Llama, with AdamW in fp32.

Resident is VmHWM from the third step on, less what a process has that has trained a model of no
size the same way: imports, threads, and what the allocator keeps. Disk is what the files take.
Bytes are those of a step, by the strategy's own counters. Seconds are wall time, medians of steps:
waiting for the drive is a part of them, as much as the strategy counts.

Bars: resident 15 %, seconds 25 %, disk 1 % (aims 10 %, 15 %, exact).
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

SMALLEST = (64, 1, 512, 1, 32)  # of the run that is subtracted
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A run, and what the planner is told of it."""

    width: int
    blocks: int
    vocabulary: int
    rows: int
    tokens: int
    stage: int = 3
    params: str = "nvme"
    optimizer: str = "nvme"
    accumulate: int = 1
    recompute: bool = False
    clip: float | None = None

    @property
    def told(self) -> str:
        words = [f"{self.blocks} x {self.width}, {self.rows} x {self.tokens} tokens"]
        words.append(f"stage {self.stage}, parameters {self.params}, states {self.optimizer}")
        words += [f"{self.accumulate} micro-batches"] * (self.accumulate > 1)
        words += ["recomputed"] * self.recompute + ["clipped"] * (self.clip is not None)
        return ", ".join(words)


CASES = (
    Case(256, 8, 1024, 4, 128),
    Case(256, 8, 1024, 1, 64),
    Case(320, 5, 1024, 4, 128),
    Case(192, 14, 1024, 4, 256, recompute=True),
    Case(256, 8, 1024, 2, 128, accumulate=2),
    Case(256, 8, 1024, 4, 128, params="cpu", optimizer="nvme"),
    Case(256, 8, 1024, 4, 128, params="cpu", optimizer="cpu"),
    Case(256, 8, 1024, 4, 128, stage=2, params="none", optimizer="nvme"),
)
IN_MEMORY = (  # what the planner is calibrated on
    Case(192, 4, 1024, 4, 128, 0, "none", "none"),
    Case(128, 8, 512, 2, 64, 0, "none", "none"),
    Case(320, 6, 2048, 2, 256, 0, "none", "none"),
    Case(256, 3, 4096, 8, 64, 0, "none", "none"),
)


# In a process of its own


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def language_model(case: Case) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.width * 8 // 3,
        num_hidden_layers=case.blocks,
        num_attention_heads=case.width // 32,
        num_key_value_heads=case.width // 32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def quiet() -> None:
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"  # else Lightning takes all cores for a strategy's
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_align"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.disable(logging.WARNING)


def train(case: Case, folder: str, steps: int) -> dict[str, float]:
    """What was measured."""
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader

    from lightning_align import PretrainModule, ZeROInfinityStrategy

    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.marks: list[tuple[float, float, int, float]] = []

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if args[-1] % case.accumulate:
                return
            if len(self.marks) == 2:  # states are there
                Path("/proc/self/clear_refs").write_text("5")
            self.marks.append((time.perf_counter(), time.process_time(), *moved(trainer)))

    def moved(trainer: Any) -> tuple[int, float]:
        engine = getattr(trainer.strategy, "_engine", None)
        if engine is None:
            return 0, 0.0
        traffic = engine.threads.traffic
        return traffic.read + traffic.written, traffic.stalled_s

    strategy: Any = "auto"
    if case.stage:
        strategy = ZeROInfinityStrategy(
            stage=case.stage,  # type: ignore[arg-type]
            offload_params_device=case.params,  # type: ignore[arg-type]
            offload_optimizer_device=case.optimizer,  # type: ignore[arg-type]
            nvme_path=str(Path(folder, "nvme")),
            overwrite=True,
        )
    watch = Watch()
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=case.clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[watch],
    )
    module = PretrainModule(
        language_model(case),
        optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True),
        activation_checkpointing=case.recompute,
    )
    generator = torch.Generator().manual_seed(0)
    shape = (steps * case.accumulate, case.rows, case.tokens + 1)
    ids = torch.randint(case.vocabulary, shape, generator=generator)
    trainer.fit(module, DataLoader([{"input_ids": x, "labels": x} for x in ids], batch_size=None))
    peak = status_bytes("VmHWM")
    if case.stage:
        strategy.close()
    files = Path(folder, "nvme").rglob("*")
    pairs = list(pairwise(watch.marks))[2:]
    return {
        "step_s": median(b[0] - a[0] for a, b in pairs),
        "cpu_s": median(b[1] - a[1] for a, b in pairs),
        "moved": median(b[2] - a[2] for a, b in pairs),
        "waited_s": median(b[3] - a[3] for a, b in pairs),
        "peak": peak,
        "disk": sum(file.stat().st_blocks * 512 for file in files),
    }


def child(case: Case, folder: str, steps: int) -> None:
    quiet()
    first = Case(*SMALLEST, case.stage, case.params, case.optimizer, recompute=case.recompute)
    Path(folder, "first").mkdir()
    train(first, str(Path(folder, "first")), 4)
    beside = status_bytes("VmRSS")
    print(json.dumps({**train(case, folder, steps), "beside": beside}))


def measured(case: Case, steps: int, where: Path | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="plan_", dir=where) as folder:
        arguments = [json.dumps(vars(case)), folder, str(steps)]
        done = subprocess.run(
            [sys.executable, __file__, "--child", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        sys.exit(f"{case.told}:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# The report


def planned(case: Case) -> tuple[Any, Any]:
    from lightning_align import ModelSpec, ParallelSpec

    spec = ModelSpec.from_module(language_model(case), seq_len=case.tokens)
    parallel = ParallelSpec(
        micro_batch_size=case.rows,
        global_batch_size=case.rows * case.accumulate,
        zero_stage=case.stage,
        offload_param=case.params,
        offload_optimizer=case.optimizer,
        activation_checkpointing="full" if case.recompute else "none",
        precision="32-true",
    )
    return spec, parallel


def calibrated(steps: int, where: Path | None, smoke: bool) -> Any:
    """A planner of this machine, with what it found of it told."""
    from lightning_align import HardwareSpec, Planner

    hardware = HardwareSpec.measure(disk=where or tempfile.gettempdir())
    rate = f"{hardware.nvme_read_bandwidth / 1e9:.2f} GB/s of the drive"
    flops = hardware.product_flops(is_half=False)
    told = f"{flops / 1e9:.1f} GFLOP/s, {hardware.mem_bandwidth / 1e9:.1f} GB/s"
    fresh = f"{(hardware.fresh_bandwidth or 0) / 1e9:.2f} GB/s of memory touched first"
    print(f"{told}, an operation {1e6 * hardware.overhead_s:.1f} us, {rate}, {fresh}\n")
    planner = Planner(hardware)
    rows = []
    for case in IN_MEMORY[: 3 if smoke else None]:
        found = measured(case, steps, where)
        plain = planner.predict(*planned(case)).step_time / found["step_s"]
        print(f"in memory, {case.told}: {1e3 * found['step_s']:.1f} ms, predicted {plain:.2f}")
        rows.append((*planned(case), found["step_s"]))
    return planner.calibrate(rows)


def report(
    planner: Any, steps: int, where: Path | None, cases: Sequence[Case], timed: bool
) -> None:
    columns = ("resident MiB", "disk MB", "MB a step", "ms")[: None if timed else 3]
    heads = [*(f"{name} | predicted / measured" for name in columns), *["ms waited"] * timed]
    print(f"\n| run | {' | '.join(heads)} |")
    print("|---|" + "---:|" * (2 * len(columns) + timed))
    errors: dict[str, list[float]] = {name: [] for name in columns}
    for case in cases:
        found = measured(case, steps, where)
        plan = planner.predict(*planned(case))
        pairs = {
            "resident MiB": (found["peak"] - found["beside"], MIB),
            "disk MB": (found["disk"], 1e6),
            "MB a step": (found["moved"], 1e6),
            "ms": (found["step_s"], 1e-3),
        }
        predictions = (
            plan.memory_per_device + plan.host_bytes,
            plan.nvme_bytes,
            plan.nvme_traffic,
            plan.step_time,
        )
        cells = [case.told]
        for (name, (value, unit)), predicted in zip(pairs.items(), predictions, strict=True):
            if name not in columns:
                continue
            if not value and not predicted:
                cells += ["-", "-"]
                continue
            ratio = predicted / max(value, 1e-9)
            errors[name].append(abs(ratio - 1))
            bar = {"resident MiB": 0.15, "disk MB": 0.01, "ms": 0.25}.get(name, 1.0)
            shown = f"{ratio:.3f}" if errors[name][-1] <= bar else f"**{ratio:.3f}**"
            cells += [f"{value / unit:.1f}", shown]
        cells += [f"{1e3 * found['waited_s']:.1f}"] * timed
        print(f"| {' | '.join(cells)} |", flush=True)
    for name, found_errors in errors.items():
        print(
            f"{name}: mean {100 * mean(found_errors):.1f} %, worst {100 * max(found_errors):.1f} %"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="two runs of few steps")
    parser.add_argument("--no-time", action="store_true", help="leave seconds out")
    parser.add_argument("--runs", type=int, nargs="+", help="numbers of those to make")
    parser.add_argument("--folder", type=Path, help="on the drive to measure")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        sizes, folder, steps = arguments.child
        child(Case(**json.loads(sizes)), folder, int(steps))
        return
    quiet()
    import lightning
    import torch

    import lightning_align

    print(f"torch {torch.__version__}, lightning {lightning.__version__}, 1 thread")
    steps, where = 6 if arguments.smoke else 12, arguments.folder
    chosen = arguments.runs or range(2 if arguments.smoke else len(CASES))
    if arguments.no_time:
        planner = lightning_align.Planner("xeon-8480")
    else:
        planner = calibrated(steps, where, arguments.smoke)
    report(planner, steps, where, [CASES[n] for n in chosen], not arguments.no_time)


if __name__ == "__main__":
    main()
