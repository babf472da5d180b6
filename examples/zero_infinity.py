"""Train under ZeRO-Infinity, be killed in the middle of a step, and go on as if nothing had been.

    python examples/zero_infinity.py

Under a minute on two cores. A process trains a small Llama whose parameters, gradients and
optimizer state are on disk, and is killed; a second one goes on with the last whole step; a third
one, which nobody stops, comes to the same weights, to the bit. Everything is below
outputs/zero_infinity, 150 MB.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import lightning as L
import torch
from transformers import LlamaConfig

import lightning_align as la


class Killed(L.Callback):
    """Ends the process, as kill -9 would, a moment after a step has begun."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        """Set the clock."""
        if trainer.global_step == self.step:
            threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGKILL)).start()


def train(folder: Path, max_steps: int, kill_at: int) -> None:
    L.seed_everything(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
    )
    module = la.PretrainModule(config, optimizer=partial(torch.optim.AdamW, lr=1e-3))
    data = la.TextDataModule("pride_and_prejudice", vocab_size=1024, block_size=128, batch_size=2)
    trainer = L.Trainer(
        strategy=la.ZeROInfinityStrategy(nvme_path=str(folder)),
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,  # every step is committed
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Killed(kill_at)] if kill_at else [],
    )
    trainer.fit(module, data, ckpt_path="last")  # the last whole step, if there is one
    on_disk = sum(file.stat().st_size for file in folder.rglob("*"))
    loss = float(trainer.callback_metrics["train_loss"])
    print(f"step {trainer.global_step}: loss {loss:.3f}, {on_disk / 1e6:.0f} MB on disk")
    torch.save(trainer.strategy.lightning_module_state_dict(), folder.with_suffix(".weights"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--output", default="outputs/zero_infinity")
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    parser.add_argument("--kill_at", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    output = Path(options.output)
    if options.run:
        train(output / options.run, options.max_steps, options.kill_at)
        return

    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    words = [f"--max_steps={options.max_steps}", f"--output={output}"]
    for run, kill_at in (("killed", options.max_steps // 2), ("killed", 0), ("whole", 0)):
        command = [sys.executable, __file__, *words, f"--run={run}", f"--kill_at={kill_at}"]
        code = subprocess.run(command, check=False).returncode
        if code != (-signal.SIGKILL if kill_at else 0):
            sys.exit(code)
        if kill_at:
            print(f"killed after step {kill_at}")
    killed, whole = (torch.load(output / f"{run}.weights") for run in ("killed", "whole"))
    same = all(torch.equal(killed[name], whole[name]) for name in whole)
    print(
        f"killed and resumed, against never stopped: {'the same bits' if same else 'they differ'}"
    )


if __name__ == "__main__":
    main()
