"""Make preference pairs from a novel and align a model with DPO, in plain Python.

    python examples/pretrain.py && python examples/align.py

Each pair prefers the author's continuation of a passage to the model's own sample.
"""

import argparse
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_align as la
from lightning_align.demo.pairs import make_pairs, write_jsonl
from lightning_align.demo.run import documents, token_split


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="outputs/pretrain/model")
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--output", default="outputs/dpo")
    options = parser.parse_args()

    L.seed_everything(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = la.TextDataModule("pride_and_prejudice", tokenizer, block_size=128)
    text.setup()
    pairs = make_pairs(
        AutoModelForCausalLM.from_pretrained(options.model),
        tokenizer,
        documents(token_split(text.train_dataset)),
        num_pairs=options.pairs,
        prompt_tokens=32,
        completion_tokens=88,  # and 8 to spare: the model has rows of 128
    )
    path = Path(options.output, "pairs.jsonl")
    write_jsonl(pairs, path)

    module = la.DPOModule(
        options.model,
        beta=0.5,
        optimizer=partial(torch.optim.AdamW, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0),
    )
    data = la.PreferenceDataModule(
        str(path), tokenizer, batch_size=16, max_length=128, val_fraction=0.1, append_eos=False
    )
    trainer = L.Trainer(
        max_epochs=2,
        gradient_clip_val=1.0,
        log_every_n_steps=4,
        default_root_dir=options.output,
        logger=CSVLogger(options.output, name="csv"),
        callbacks=[la.SavePretrained(f"{options.output}/model")],
    )
    trainer.fit(module, data)


if __name__ == "__main__":
    main()
