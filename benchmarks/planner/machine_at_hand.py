"""Plans for the machine at hand: each is run from its YAML, and the one recommended has its rank.

    python benchmarks/planner/machine_at_hand.py --folder runs    # 10 minutes of CPU on two cores
    python benchmarks/planner/machine_at_hand.py --folder runs --smoke

The machine is measured (``HardwareSpec.measure``) and taken for two devices of one core each. The
planner is calibrated on steps of other sizes, all in one process. Then plans for one model and 16
rows a step are predicted and written as ``lightning-align plan`` writes them, and each file is run
by ``lightning-align fit``, in processes of its own, with a second file that ends it after a few
steps and notes when they began. Of a group (what optimizer) the plan recommended is the one with
the shortest prediction; its measured rank is its place among all that ran.

Seconds are medians of wall time, which needs both cores calm; beside them the CPU time of the
busiest process. What was measured is kept in the folder, and a second call goes on from there.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning.pytorch as pl

ROWS, SEQUENCE = 16, 128
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 256,
}
TWO: dict[str, Any] = {"devices": 2}
PIPELINE: dict[str, Any] = {"devices": 2, "pipeline_parallel": 2}
PLANS: dict[str, dict[str, Any]] = {
    "one core": {"micro_batch_size": 16},
    "one core, micro-batches of 2": {"micro_batch_size": 2},
    "one core, recomputed": {"micro_batch_size": 16, "activation_checkpointing": "full"},
    "two replicas": {**TWO, "micro_batch_size": 8},
    "two replicas, micro-batches of 2": {**TWO, "micro_batch_size": 2},
    "two replicas, recomputed": {
        **TWO,
        "micro_batch_size": 8,
        "activation_checkpointing": "full",
    },
    "two replicas, ZeRO 2, states on cpu": {
        **TWO,
        "micro_batch_size": 8,
        "zero_stage": 2,
        "offload_optimizer": "cpu",
    },
    "two replicas, ZeRO 3, all on nvme": {
        **TWO,
        "micro_batch_size": 8,
        "zero_stage": 3,
        "offload_param": "nvme",
        "offload_optimizer": "nvme",
    },
    "pipeline, micro-batches of 2": {**PIPELINE, "micro_batch_size": 2},
    "pipeline, micro-batches of 8": {**PIPELINE, "micro_batch_size": 8},
    "pipeline, interleaved": {
        **PIPELINE,
        "micro_batch_size": 2,
        "schedule": "Interleaved1F1B",
        "num_model_chunks": 2,
    },
    "two replicas, Muon": {**TWO, "micro_batch_size": 8, "optimizer": "muon"},
    "two replicas, GaLore": {
        **TWO,
        "micro_batch_size": 8,
        "optimizer": "galore_adamw",
        "rank": 32,
    },
    "two replicas, LISA": {**TWO, "micro_batch_size": 8, "lisa_layers": 2},
}
SMOKE = ("one core", "two replicas", "pipeline, micro-batches of 2")
# Width, blocks, vocabulary, rows, tokens of the steps that the planner is calibrated on.
# The last two on two replicas, which tells what messages cost here.
KNOWN = (
    *((128, 4, 512, 4, 128, 1), (256, 4, 1024, 8, 64, 1), (320, 3, 2048, 2, 256, 1)),
    *((64, 8, 512, 8, 64, 1), (128, 4, 512, 4, 128, 2), (256, 4, 1024, 8, 64, 2)),
)


class StepTimes(pl.Callback):
    """Writes when each step began, and the CPU time until then, of each process.

    Args:
        path: Of the file, without the process's rank.
        accumulate: Batches of a step.
    """

    def __init__(self, path: str, accumulate: int = 1) -> None:
        self.path, self.accumulate = path, accumulate
        self.marks: list[tuple[float, float]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        if args[-1] % self.accumulate == 0:
            self.marks.append((time.perf_counter(), time.process_time()))

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        Path(f"{self.path}.{trainer.global_rank}").write_text(json.dumps(self.marks))


def run_of(sizes: dict[str, int], folder: Path) -> dict[str, Any]:
    """What a user has before there is a plan: a model and data."""
    config = {"class_path": "transformers.LlamaConfig", "init_args": sizes}
    text = {"paths": "pride_and_prejudice", "vocab_size": 512, "val_fraction": 0.0}
    return {
        "model": {"class_path": "PretrainModule", "init_args": {"model": config}},
        "data": {
            "class_path": "TextDataModule",
            "init_args": {**text, "cache_dir": str(folder / "cache")},
        },
    }


def environment() -> dict[str, str]:
    here, root = Path(__file__).parent, Path(__file__).parents[2]
    paths = [str(here), str(root), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def measured(plan: Any, sizes: dict[str, int], folder: Path, name: str, steps: int) -> Any:
    """Seconds of wall and of CPU of a step, by running the plan's YAML."""
    import yaml

    from lightning_align.cli import plan_yaml

    kept = folder / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    path, over = folder / f"{name}.yaml", folder / f"{name}.short.yaml"
    plan_yaml.write(path, plan_yaml.configuration(plan, run_of(sizes, folder)), name)
    times = folder / f"{name}.times"
    accumulate = yaml.safe_load(path.read_text())["trainer"]["accumulate_grad_batches"]
    watch = {
        "class_path": "machine_at_hand.StepTimes",
        "init_args": {"path": str(times), "accumulate": accumulate},
    }
    short = {
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "default_root_dir": str(folder / "root"),
        "callbacks+": [watch],
    }
    over.write_text(yaml.safe_dump({"trainer": short}))
    command = [sys.executable, "-m", "lightning_align", "fit", "-c", str(path), "-c", str(over)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        sys.exit(f"{name}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    found = []
    for each in sorted(folder.glob(f"{name}.times.*")):
        pairs = list(pairwise(json.loads(each.read_text())))[2:]
        found.append([median(b[clock] - a[clock] for a, b in pairs) for clock in (0, 1)])
    value = [max(seconds) for seconds in zip(*found, strict=True)]
    keep(kept, value)
    return value


def keep(path: Path, value: Any) -> None:
    """Whole or not at all: what is there is taken for measured."""
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(value))
    whole.replace(path)


def hardware_of(folder: Path, devices: int) -> Any:
    """The machine, measured once."""
    from dataclasses import asdict

    from lightning_align import HardwareSpec

    kept = folder / "hardware.json"
    if not kept.exists():
        keep(kept, asdict(HardwareSpec.measure(disk=folder)))
    found = HardwareSpec(**json.loads(kept.read_text()))
    return replace(found, devices=devices, devices_per_node=devices)


def spec_of(sizes: dict[str, int], sequence: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_align import ModelSpec

    return ModelSpec.from_module(LlamaForCausalLM(LlamaConfig(**sizes)), seq_len=sequence)


def known_rows(folder: Path, steps: int, count: int) -> list[Any]:
    """Steps of other sizes that the planner is calibrated on."""
    from lightning_align import ParallelSpec, Planner

    rows = []
    for width, blocks, vocabulary, batch, tokens, devices in KNOWN[:count]:
        sizes = {
            **SIZES,
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": width * 8 // 3,
            "num_hidden_layers": blocks,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 32,
        }
        spec = spec_of(sizes, tokens)
        parallel = ParallelSpec(
            devices=devices, micro_batch_size=batch // devices, precision="32-true"
        )
        plan = Planner(hardware_of(folder, devices)).predict(spec, parallel)
        name = f"known {width} x {blocks}" + ", two replicas" * (devices - 1)
        wall, _ = measured(plan, sizes, folder, name, steps)
        print(f"{name}: {1e3 * wall:.1f} ms, predicted {plan.step_time / wall:.2f} of it")
        rows.append((spec, parallel, wall))
    return rows


def recommended(planner: Any, spec: Any) -> Any:
    """What ``plan --runnable true`` puts first, with AdamW."""
    from lightning_align import ParallelSpec
    from lightning_align.cli.plan_yaml import unrunnable
    from lightning_align.planner.search import ranked

    base = ParallelSpec(devices=2, global_batch_size=ROWS, precision="32-true")
    return next(each for each in ranked(planner, spec, base) if not unrunnable(each))


def report(folder: Path, smoke: bool) -> None:
    from lightning_align import ParallelSpec, Planner
    from lightning_align.cli.plan_report import split_of

    folder.mkdir(parents=True, exist_ok=True)
    steps = 5 if smoke else 12
    hardware = hardware_of(folder, 2)
    flops = hardware.product_flops(is_half=False)
    told = f"{flops / 1e9:.1f} GFLOP/s, {hardware.mem_bandwidth / 1e9:.1f} GB/s"
    print(f"{told}, an operation {1e6 * hardware.overhead_s:.1f} us")
    rows = known_rows(folder, steps, 3 if smoke else len(KNOWN))
    planner = Planner(hardware)
    planner.calibrate(rows)
    spec = spec_of(SIZES, SEQUENCE)
    plans = {}
    for name in SMOKE if smoke else PLANS:
        parallel = ParallelSpec(global_batch_size=ROWS, precision="32-true", **PLANS[name])
        plans[name] = planner.predict(spec, parallel)
    best = recommended(planner, spec)
    if best.parallel not in [plan.parallel for plan in plans.values()]:
        plans[f"recommended, {split_of(best.parallel)}"] = best
    found = []
    for name, plan in plans.items():
        found.append((name, plan, *measured(plan, SIZES, folder, name, steps)))
        print(f"  {name}: {1e3 * found[-1][2]:.0f} ms", flush=True)
    show(found, best)


def show(found: list[tuple[str, Any, float, float]], best: Any) -> None:
    by_plan = sorted(found, key=lambda row: row[1].step_time)
    order = [name for name, *_ in sorted(found, key=lambda row: row[2])]
    columns = ("plan", "predicted ms", "measured ms", "predicted / measured", "CPU ms")
    print(f"\n| {' | '.join(columns)} | rank predicted | rank measured |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for rank, (name, plan, wall, cpu) in enumerate(by_plan, start=1):
        cells = [name, f"{1e3 * plan.step_time:.0f}", f"{1e3 * wall:.0f}"]
        cells += [f"{plan.step_time / wall:.2f}", f"{1e3 * cpu:.0f}", str(rank)]
        print(f"| {' | '.join(cells)} | {order.index(name) + 1} |")
    same = [row for row in found if row[1].parallel.optimizer == "adamw"]
    same = [row for row in same if row[1].parallel.lisa_layers is None]
    seconds = {row[1].parallel: row[2] for row in same}
    walls = sorted(seconds.values())
    ours = seconds[best.parallel]
    print(
        f"\nrecommended with AdamW: rank {walls.index(ours) + 1} of {len(walls)}, "
        f"{100 * (ours / walls[0] - 1):.1f} % slower than the fastest of them"
    )
    errors = [abs(plan.step_time / wall - 1) for _, plan, wall, _ in found]
    ranks = [order.index(name) for name, *_ in by_plan]
    spread, count = sum((a - b) ** 2 for a, b in enumerate(ranks)), len(ranks)
    correlation = 1 - 6 * spread / (count * (count**2 - 1))
    print(
        f"fastest by prediction: rank {ranks[0] + 1} of {count}; MAPE {100 * mean(errors):.1f} %, "
        f"worst {100 * max(errors):.1f} %; Spearman {correlation:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="of files and of what was found")
    parser.add_argument("--smoke", action="store_true", help="three plans, few steps")
    arguments = parser.parse_args()
    import lightning
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, a thread each process")
    report(arguments.folder.resolve(), arguments.smoke)


if __name__ == "__main__":
    main()
