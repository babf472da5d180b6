"""Peak memory of strategy="zero_infinity" at 48 blocks over that at 12, activations offloaded.

    python benchmarks/zero_infinity/depth.py          # 6 minutes, 1 GB of disk
    python benchmarks/zero_infinity/depth.py --small  # a minute

A Llama of width 256 with 12 and with 48 blocks learns random tokens with AdamW under the string's
defaults and activation checkpointing, each run in a process of its own, with
offload_activations="nvme" and, for comparison, "none": then the inputs of all blocks stay in
memory. Peak: VmHWM from the first training step on.

Bar: 1.05, aim 1.02.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from memory import forget_peak, llama, quiet, status_bytes

DEPTHS = 12, 48
ROWS, LENGTH = 8, 512
WIDTH = 256


def child(depth: int, activations: Any, rows: int, folder: str) -> None:
    from functools import partial

    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader

    from lightning_align import PretrainModule
    from lightning_align.strategies import ZeROInfinityStrategy

    quiet()
    torch.manual_seed(0)

    class Watch(pl.Callback):
        times: list[float]

        def on_train_start(self, *_: Any) -> None:
            forget_peak()
            self.times = [time.perf_counter()]

        def on_train_batch_end(self, *_: Any) -> None:
            self.times.append(time.perf_counter())

    ids = torch.randint(0, 1000, (4 * rows, LENGTH))
    batches = [{"input_ids": part, "labels": part} for part in ids.split(rows)]
    build = partial(torch.optim.AdamW, lr=3e-4, fused=True)
    strategy = ZeROInfinityStrategy(nvme_path=folder, offload_activations=activations)
    watch = Watch()
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[watch],
    )
    with trainer.init_module():
        module = PretrainModule(llama(WIDTH, depth), build, activation_checkpointing=True)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    step_s = (watch.times[-1] - watch.times[1]) / (len(watch.times) - 2)
    print(json.dumps({"peak": status_bytes("VmHWM"), "step_s": step_s}))


def measured(depth: int, activations: str, rows: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="zero_infinity_") as folder:
        words = [str(depth), activations, str(rows), folder]
        command = [sys.executable, __file__, "--child", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{words} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a quarter of the tokens")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        depth, activations, rows, folder = arguments.child
        child(int(depth), activations, int(rows), folder)
        return
    rows = ROWS // 4 if arguments.small else ROWS
    start = time.perf_counter()
    print(f"load average {os.getloadavg()[0]:.1f}; {rows} x {LENGTH} tokens of width {WIDTH}, ")
    inputs = [depth * rows * LENGTH * WIDTH * 4 / 1e6 for depth in DEPTHS]
    print(f"inputs of {DEPTHS[0]} blocks {inputs[0]:.0f} MB, of {DEPTHS[1]} {inputs[1]:.0f} MB")
    for activations in ("none", "nvme"):
        found = [measured(depth, activations, rows) for depth in DEPTHS]
        for depth, run in zip(DEPTHS, found, strict=True):
            peak, step_s = run["peak"] / 1e6, run["step_s"]
            print(f"  {activations}: {depth} blocks, peak {peak:.0f} MB, {step_s:.2f} s a step")
        ratio = found[1]["peak"] / found[0]["peak"]
        bar = " (bar 1.05, aim 1.02)" if activations == "nvme" else ""
        print(f"  {activations}: {ratio:.3f}{bar}", flush=True)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
