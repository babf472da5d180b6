"""What a newcomer has at hand, and the form of a mistake in the lists beside this file."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig

import lightning_align as la

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GROWING = {
    "min_difficulty": 8,
    "max_difficulty": 16,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 8},
}


@dataclass
class Desk:
    """What a newcomer has at hand: files, a tokenizer, and the first lines of a script."""

    folder: Path

    def at(self, name: str) -> str:
        return str(self.folder / name)

    def write(self, name: str, content: str) -> str:
        (self.folder / name).write_text(content)
        return self.at(name)

    def rows(self, name: str, *records: Any) -> str:
        return self.write(name, "".join(json.dumps(record) + "\n" for record in records))

    def pretrain(self, **options: Any) -> la.PretrainModule:
        return la.PretrainModule(**{"model": LlamaConfig(**SIZES), **options})

    def dpo(self, **options: Any) -> la.DPOModule:
        return la.DPOModule(**{"model": LlamaConfig(**SIZES), **options})

    def text(self, paths: Any = None, **options: Any) -> la.TextDataModule:
        given = {"tokenizer": self.at("tokenizer"), "block_size": 16, "cache_dir": self.at("cache")}
        return la.TextDataModule(paths or self.at("text.jsonl"), **{**given, **options})

    def pairs(self, paths: Any = None, **options: Any) -> la.PreferenceDataModule:
        given = {"tokenizer": self.at("tokenizer"), "max_length": 32}
        return la.PreferenceDataModule(paths or self.at("pairs.jsonl"), **{**given, **options})

    def chats(self, paths: Any = None, **options: Any) -> la.ConversationDataModule:
        given = {"tokenizer": self.at("tokenizer"), "max_length": 40}
        paths = paths or self.at("conversations.jsonl")
        return la.ConversationDataModule(paths, **{**given, **options})

    def fit(self, *parts: Any, module: Any = None, data: Any = None, **options: Any) -> None:
        """Train with these callbacks."""
        trainer = pl.Trainer(
            **{
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": 2,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": any(isinstance(p, pl.callbacks.Checkpoint) for p in parts),
                "callbacks": list(parts),
                "default_root_dir": self.folder / "run",
                **options,
            }
        )
        trainer.fit(self.pretrain() if module is None else module, data or self.text())


class M(NamedTuple):
    """A mistake: the public classes that it is made with, what the error names, and how to make it.

    A name before the colon of an error is that of an argument; an empty one is any.
    """

    classes: str
    names: str
    make: Callable[[Desk], Any]


def loader(*batches: Any) -> Any:
    return DataLoader(list(batches), batch_size=None)


IDS = torch.ones(2, 9, dtype=torch.long)
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 2}}
