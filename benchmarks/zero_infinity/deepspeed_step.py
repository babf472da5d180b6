"""A step of DeepSpeed's NVMe offload of optimizer states against a step of zero_infinity.

    python benchmarks/zero_infinity/deepspeed_step.py          # 12 minutes, 1.3 GB of disk
    python benchmarks/zero_infinity/deepspeed_step.py --small  # a minute: does it run

Needs deepspeed (0.19.8 was read), a compiler and libaio: its first use builds an operator, which
takes minutes. Everything runs on the CPU, one rank, gloo, one compute thread, each run in a process
of its own; the order of the sides alternates.

Both train the same Llama (8 blocks of width 512, 26 M parameters, fp32) with torch's AdamW on the
same batches. DeepSpeed: stage 3, offload_optimizer to NVMe, parameters in memory, its step without
a Trainer; of the buffer settings tried the one with the least median step counts. Ours does more:
parameters and gradients are on disk, too, each step is committed, and a Trainer runs it.

Then DeepSpeed's offload of parameters, which ours is to be compared with, with what it says.

Bar: step of DeepSpeed over ours 1.0; aim 2. Seconds of a step, median without the first two.
"""

import argparse
import contextlib
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

import torch
from memory import llama, moved_bytes, quiet, told
from step import SEQUENCE, Case, Timer, batches

TOKENS = (32, 512)
BUFFERS = {  # of offload_optimizer; the first are DeepSpeed's defaults
    "buffer_count 4": {"buffer_count": 4},
    "buffer_count 40, pipelined": {
        "buffer_count": 40,  # fewer are too few for it: it says so and ends
        "pipeline_read": True,
        "pipeline_write": True,
    },
    "fast_init, 4 MiB": {"buffer_count": 5, "fast_init": True},
    "fast_init, 1 MiB": {"buffer_count": 5, "fast_init": True},
}
AIO = {
    "buffer_count 4": {},
    "buffer_count 40, pipelined": {"block_size": 1 << 20, "queue_depth": 32, "thread_count": 2},
    "fast_init, 4 MiB": {"block_size": 4 << 20, "queue_depth": 8, "thread_count": 2},
    "fast_init, 1 MiB": {"block_size": 1 << 20, "queue_depth": 32, "thread_count": 2},
}
PARAMETERS = "offload of parameters"


def ours(tokens: int, case: Case) -> list[float]:
    marks = case.offloaded(tokens, Timer(), None)[0].marks
    return [b[0] - a[0] for a, b in pairwise(marks)]


def theirs(setting: str, tokens: int, case: Case) -> list[float]:
    """Seconds of each of DeepSpeed's steps."""
    import deepspeed

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29655")
    deepspeed.init_distributed("gloo", verbose=False)
    path = str(Path(case.folder, "deepspeed"))
    zero: dict[str, Any] = {"stage": 3, "sub_group_size": 8 << 20}
    buffers = {"device": "nvme", "nvme_path": path, **BUFFERS.get(setting, {"buffer_count": 4})}
    zero["offload_optimizer"] = {**buffers, "pin_memory": False}
    if setting == PARAMETERS:
        zero["offload_param"] = {"device": "nvme", "nvme_path": path, "buffer_count": 80}
        zero["offload_param"]["buffer_size"] = 4 << 20  # elements; fewer buffers are too few
        zero["offload_param"]["max_in_cpu"] = 0  # of elements; by default 1e9 stay in memory
        zero["stage3_param_persistence_threshold"] = 0  # else what is small stays in memory
    config = {
        "train_micro_batch_size_per_gpu": max(1, tokens // SEQUENCE),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeedCPUAdam is not torch's AdamW
        "aio": AIO.get(setting, {}),
    }
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=setting == PARAMETERS):
        model = llama(case.width, case.blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    found = []
    for batch in batches(tokens, case.steps):
        start = time.perf_counter()
        loss = engine(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        engine.backward(loss)
        engine.step()
        found.append(time.perf_counter() - start)
    return found


def child(side: str, tokens: int, case: Case) -> None:
    quiet()
    found = ours(tokens, case) if side == "ours" else theirs(side, tokens, case)
    print(json.dumps({"seconds": found, "moved": moved_bytes()}))


def process(side: str, tokens: int, case: Case) -> dict[str, Any]:
    """What a run in a process of its own has found, or what it said last."""
    words = [f"--side={side}", f"--run-tokens={tokens}", f"--run={json.dumps(vars(case))}"]
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    shutil.rmtree(Path(case.folder, "deepspeed"), ignore_errors=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "Error: " in line or "tion: " in line]
        return {"error": said[-1] if said else f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(tokens: int, case: Case, repeats: int) -> None:
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in ("ours", *BUFFERS)}
    for number in range(repeats):
        order = list(found)
        for side in order[number % len(order) :] + order[: number % len(order)]:
            found[side].append(process(side, tokens, case))
    print(
        f"\n{tokens} tokens, {repeats} repeats, ms a step: median [min, max] of medians; GB moved"
    )
    times = {}
    for side, runs in found.items():
        errors = [run["error"] for run in runs if "error" in run]
        if errors:
            print(f"  {side:<28} failed: {errors[0][:120]}")
            continue
        values = [1e3 * median(run["seconds"][2:]) for run in runs]
        times[side] = values
        moved = median(sum(run["moved"]) for run in runs) / 1e9
        figures = f"{median(values):7.0f} [{min(values):.0f}, {max(values):.0f}]"
        print(f"  {side:<28} {figures:<24} {moved:5.1f}")
    peers = [side for side in times if side != "ours"]
    if peers and "ours" in times:
        best = min(peers, key=lambda side: median(times[side]))
        ratios = [a / b for a, b in zip(times[best], times["ours"], strict=True)]
        spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"  DeepSpeed ({best}) / ours = {median(ratios):.2f} {spread} (bar 1.0)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="width 128, one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--folder", type=Path, help="on the drive to measure")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--run-tokens", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        child(arguments.side, arguments.run_tokens, Case(**json.loads(arguments.run)))
        return
    folder = tempfile.mkdtemp(prefix="zero_infinity_", dir=arguments.folder)
    case = Case(128 if arguments.small else 512, 8, arguments.steps, folder)
    with told(), contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        for tokens in arguments.tokens[: 1 if arguments.small else None]:
            compare(tokens, case, 1 if arguments.small else arguments.repeats)
        found = process(PARAMETERS, arguments.tokens[0], case)
        said = found.get("error")
        if said is None:
            moved = sum(found["moved"]) / 1e9
            said = f"{1e3 * median(found['seconds'][2:]):.0f} ms a step, {moved:.1f} GB moved"
        print(f"\nDeepSpeed's offload of parameters, {arguments.tokens[0]} tokens: {said}")


if __name__ == "__main__":
    main()
