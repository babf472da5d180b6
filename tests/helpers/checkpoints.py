"""Checkpoints as a run leaves them, without the run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from lightning_align.data.tokenizer import train_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def small_tokenizer() -> Any:
    """One of 280 tokens with a chat template."""
    trained = train_tokenizer(["It is a truth universally acknowledged."], 280)
    trained.chat_template = TEMPLATE
    return trained


def llama_folder(folder: Path, tokenizer: Any) -> Path:
    """A model folder as users have them: with tokenizer, template and generation config."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    model.generation_config = GenerationConfig(eos_token_id=[0, 7], do_sample=True, top_p=0.75)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_checkpoint(path: Path, module: pl.LightningModule, data: Any = None) -> Path:
    """What ``ModelCheckpoint`` would write before the first step."""
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", enable_progress_bar=False, **options)
    trainer.strategy.connect(module)
    if data is not None:
        trainer.datamodule = data
        data.trainer = trainer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.save_checkpoint(path)
    return path
