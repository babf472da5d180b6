"""Pretrain a small Llama on a novel: what pretrain.yaml does, in plain Python.

    python examples/pretrain.py

About two minutes on two cores. Leaves outputs/pretrain/model, which align.py continues from.
"""

import argparse
from functools import partial

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from transformers import LlamaConfig

import lightning_align as la


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_steps", type=int, default=1500)
    parser.add_argument("--output", default="outputs/pretrain")
    options = parser.parse_args()

    L.seed_everything(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=3,
        num_attention_heads=5,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
    )
    module = la.PretrainModule(
        config,
        optimizer=partial(la.Muon, lr=5e-3, adjust_lr_fn="match_rms_adamw", weight_decay=0.1),
        lr_scheduler=partial(
            torch.optim.lr_scheduler.OneCycleLR,
            max_lr=5e-3,
            total_steps=options.max_steps,
            pct_start=0.05,
            anneal_strategy="linear",
            cycle_momentum=False,
        ),
    )
    data = la.TextDataModule("pride_and_prejudice", vocab_size=1024, block_size=128, batch_size=4)
    trainer = L.Trainer(
        max_steps=options.max_steps,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        default_root_dir=options.output,
        logger=CSVLogger(options.output, name="csv"),
        callbacks=[
            la.SavePretrained(f"{options.output}/model"),
            la.MetricPlot(["train_loss", "val_loss", "grad_norm", "lr"], filename="pretrain.png"),
            ModelCheckpoint(f"{options.output}/checkpoints", every_n_train_steps=250),
        ],
    )
    trainer.fit(module, data)


if __name__ == "__main__":
    main()
