"""Short rows before long ones, on a novel: python examples/curriculum.py, about a minute.

A small Llama reads "Pride and Prejudice" in rows of 256 tokens, and in rows that grow from 16: each
batch is reshaped, so that both runs learn from the same tokens in the same order, with the same
schedule of the learning rate. Short rows take less time. Validation always has whole rows. This is
one seed of a short run, to see how it is done; docs/curriculum.md has what to expect of it.
"""

import argparse
import logging
import time
import warnings
from functools import partial
from typing import Any

import lightning as L
import torch
from transformers import LlamaConfig

import lightning_align as la


class Clock(L.Callback):
    """CPU seconds of the training steps, without validation."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin."""
        self._began = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        """End."""
        self.seconds += time.process_time() - self._began


def growing(steps: int, output: str) -> la.Curriculum:
    """Rows of 16, 32, 64 and 128 tokens for an eighth of the run each, then whole ones."""
    ends = [steps * part // 8 for part in (1, 2, 3, 4)]
    scheduler = {
        "min_difficulty": 16,
        "max_difficulty": 256,
        "schedule_type": "fixed_discrete",
        "schedule_config": {"difficulty": [16, 32, 64, 128, 256], "max_step": ends},
    }
    length = {"mode": "reshape", "scheduler": scheduler}
    return la.Curriculum(length=length, filename=f"{output}.png")


def run(steps: int, curriculum: la.Curriculum | None) -> tuple[float, float]:
    """CPU seconds of training, and the loss on held-out chapters."""
    L.seed_everything(0, verbose=False)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
    config = LlamaConfig(
        vocab_size=1024, num_attention_heads=3, max_position_embeddings=256, **sizes
    )
    optimizer = partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    data = la.TextDataModule("pride_and_prejudice", vocab_size=1024, block_size=256, batch_size=4)
    tokens = la.TokenSchedule(max_tokens=steps * 4 * 256, warmup_tokens=steps * 4 * 256 // 20)
    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=[tokens, clock, *([curriculum] if curriculum else [])],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = la.PretrainModule(config, optimizer=optimizer)
    trainer.fit(module, data)
    (measured,) = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    ).validate(module, data, verbose=False)
    return clock.seconds, measured["val_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", default="curriculum")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    curriculum = growing(options.steps, options.output)
    print("batch  tokens of a row")
    for row in curriculum.preview(range(0, options.steps, max(1, options.steps // 8))):
        print(f"{row['batch']:5}  {row['length']:15}")
    print("rows      CPU s of training    loss on held-out chapters")
    for name, callback in (("whole", None), ("growing", curriculum)):
        seconds, loss = run(options.steps, callback)
        print(f"{name:8}  {seconds:17.1f}    {loss:25.3f}")


if __name__ == "__main__":
    main()
