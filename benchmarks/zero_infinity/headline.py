"""A Llama of 2 billion parameters, 24 GB of states, trained under an enforced limit of 4 GB.

    python benchmarks/zero_infinity/headline.py          # 45 minutes at most, 65 GB of disk
    python benchmarks/zero_infinity/headline.py --size medium  # 0.5 billion under 2.5 GB, 15 GB
    python benchmarks/zero_infinity/headline.py --size small  # 50 M under 1 GB: does it run

40 blocks of width 2048 are built on disk, and learn one batch of "Pride and Prejudice" again and
again with AdamW in fp32, under the string's defaults (atomic steps) and activation checkpointing.
In the middle of a step the process is killed (SIGKILL), and another one resumes. At the end it
continues a prompt greedily (GenerateSamples) and saves; a last process exports the checkpoint as a
folder of transformers. Each of these processes has the limit from its start: a memory cgroup, which
counts page cache, or RLIMIT_DATA where none can be made.

The script fails unless the second process goes on with the last step that the first one has
finished, the loss falls from its first to its last step, and the folder is complete.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import (
    VOCABULARY,
    enforce,
    enter,
    group_events,
    memory_group,
    novel,
    quiet,
    status_bytes,
)

SIZES = {  # width, blocks, limit in GB
    "full": (2048, 40, 4.0),
    "medium": (2048, 10, 2.5),
    "small": (512, 16, 1.0),
}
TOKENS = 128
PROMPT = "It is a truth universally"


# In processes of their own


def prepare(folder: Path) -> None:
    """Tokenizer and batch, made once and without the limit."""
    import torch

    data = novel(TOKENS, str(folder))
    data.prepare_data()
    data.setup("fit")
    data.tokenizer.save_pretrained(folder / "tokenizer")
    torch.save(next(iter(data.train_dataloader())), folder / "batch.pt")


def train(folder: Path, size: str, steps: int) -> None:
    from functools import partial

    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader
    from transformers import LlamaConfig

    import lightning_align as la

    width, blocks, _ = SIZES[size]
    batch = torch.load(folder / "batch.pt")

    class Watch(pl.Callback):
        """Tells of each step once it is committed."""

        loss = float("nan")
        began = 0.0

        def tell(self, trainer: Any) -> None:
            seconds = time.perf_counter() - self.began
            told = {"step": trainer.global_step, "loss": self.loss, "seconds": seconds}
            print(json.dumps(told), flush=True)

        def on_train_start(self, trainer: Any, *_: Any) -> None:
            self.began = start
            self.tell(trainer)

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if self.loss == self.loss:  # behind a step: what was committed is told
                self.tell(trainer)
            self.began = time.perf_counter()

        def on_train_batch_end(self, *given: Any) -> None:
            self.loss = float(given[2]["loss"]) / TOKENS

        def on_train_end(self, trainer: Any, *_: Any) -> None:
            self.tell(trainer)

    start = time.perf_counter()
    samples = la.GenerateSamples(
        [PROMPT],
        every_n_train_steps=10**6,  # at the end alone
        max_new_tokens=4,
        do_sample=False,
        tokenizer=str(folder / "tokenizer"),
        at_start=False,
    )
    trainer = pl.Trainer(
        strategy=la.ZeROInfinityStrategy(nvme_path=str(folder / "nvme")),
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Watch(), samples],
    )
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
    )
    with trainer.init_module():
        torch.manual_seed(0)
        build = partial(torch.optim.AdamW, lr=1e-4, fused=True)
        module = la.PretrainModule(config, build, activation_checkpointing=True)
    count = sum(p.numel() for p in module.parameters())
    trainer.fit(module, DataLoader([batch] * steps, batch_size=None), ckpt_path="last")
    began = time.perf_counter()
    trainer.save_checkpoint(folder / "trained.ckpt")
    saved = time.perf_counter() - began
    print(json.dumps({"parameters": count, "saved_s": saved}), flush=True)


def export(folder: Path) -> None:
    from lightning_align.cli import export as cli

    cli.export(folder / "trained.ckpt", folder / "exported", tokenizer=folder / "tokenizer")


def child(arguments: argparse.Namespace) -> None:
    folder, group = Path(arguments.folder), arguments.group and Path(arguments.group)
    if arguments.do == "prepare":
        prepare(folder)
        return
    enter(group)
    enforced_by = enforce(group, int(arguments.limit))
    quiet(arguments.threads)
    if arguments.do == "train":
        train(folder, arguments.size, arguments.steps)
    else:
        export(folder)
    peak, met = status_bytes("VmHWM"), group_events(group)
    print(json.dumps({"peak": peak, "met": met, "enforced_by": enforced_by}))


# The report


class Process:
    """One of the script's processes, and what it has told so far."""

    def __init__(self, do: str, folder: str, group: Path | None, arguments: Any) -> None:
        options = {
            "do": do,
            "folder": folder,
            "group": group or "",
            "size": arguments.size,
            "steps": arguments.steps,
            "threads": arguments.threads,
            "limit": int(SIZES[arguments.size][2] * 1e9),
        }
        words = [sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())]
        self._errors = Path(folder, "errors")
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.told: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []

    def until(self, step: float) -> None:
        """Read what it tells until it has finished a step, or ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                if "step" in found:
                    self.steps.append(found)
                    number, loss, seconds = found["step"], found["loss"], found["seconds"]
                    print(f"  step {number}: loss {loss:.4f}, {seconds:.1f} s", flush=True)
                    if number >= step:
                        return
                self.told |= found
        if self._process.wait():
            code, errors = self._process.returncode, self._errors.read_text()[-3000:]
            sys.exit(f"{self._process.args} ended with {code}:\n{errors}")

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def run(folder: str, group: Path | None, arguments: Any) -> None:
    Process("prepare", folder, None, arguments).until(float("inf"))
    steps, start = arguments.steps, time.perf_counter()
    print("built on disk, and trained until it is killed:")
    first = Process("train", folder, group, arguments)
    first.until(steps // 2)
    time.sleep(0.7 * first.steps[-1]["seconds"])
    first.kill()
    done = first.steps[-1]["step"]
    print(f"killed in step {done + 1}; resumed:")
    second = Process("train", folder, group, arguments)
    second.until(float("inf"))
    disk = sum(f.stat().st_blocks * 512 for f in Path(folder, "nvme").rglob("*"))
    trained, parameters = time.perf_counter() - start, second.told["parameters"]
    shutil.rmtree(Path(folder, "nvme"))  # the checkpoint's links keep what is exported
    began = time.perf_counter()
    third = Process("export", folder, group, arguments)
    third.until(float("inf"))
    exported = sum(f.stat().st_size for f in Path(folder, "exported").glob("*.safetensors"))
    text = Path(folder, "samples.jsonl").read_text().splitlines()[-1]
    limit = SIZES[arguments.size][2]
    print(
        f"{parameters / 1e9:.2f} billion parameters, states {12 * parameters / 1e9:.1f} GB, limit"
        f" {limit} GB by {second.told['enforced_by']} (met: {second.told['met']} times)\n"
        f"peak of resuming and training {second.told['peak'] / 1e9:.2f} GB, of exporting"
        f" {third.told['peak'] / 1e9:.2f} GB; disk {disk / 1e9:.1f} GB, exported"
        f" {exported / 1e9:.1f} GB\n"
        f"seconds: {trained:.0f} to build and train, with the kill; {second.told['saved_s']:.2f} to"
        f" save; {time.perf_counter() - began:.0f} to export\n"
        f"sample: {text}"
    )
    losses = [found["loss"] for found in first.steps + second.steps]
    losses = [loss for loss in losses if loss == loss]
    checks = {
        "resumed at the last finished step": second.steps[0]["step"] == done,
        "loss falls": losses[-1] < losses[0],
        "exported whole": exported >= 4 * parameters,
        "all steps": second.steps[-1]["step"] == steps,
    }
    print(", ".join(f"{what}: {is_so}" for what, is_so in checks.items()))
    if not all(checks.values()):
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="that compute")
    parser.add_argument("--folder", help="on the drive to use")
    for hidden in ("do", "group", "limit"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.do:
        child(arguments)
        return
    start = time.perf_counter()
    print(f"load average {os.getloadavg()[0]:.1f}", flush=True)
    folder = tempfile.mkdtemp(prefix="zero_infinity_", dir=arguments.folder)
    try:
        with memory_group() as group:
            run(folder, group, arguments)
    finally:
        shutil.rmtree(folder)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
