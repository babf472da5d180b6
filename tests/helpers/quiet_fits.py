"""A fit of each kind, as a user would write it, in one process whose output a test reads.

A warning of our own is an error here: ``python -W error`` cannot say of whose modules it means.
"""

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from transformers import LlamaConfig

import lightning_align as la

warnings.filterwarnings("error", module=r"lightning_align\b")
Parts = tuple[pl.LightningModule, pl.LightningDataModule, dict[str, Any]]
SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
CPU = {"accelerator": "cpu", "devices": 1}


def config() -> LlamaConfig:
    return LlamaConfig(**SIZES, num_attention_heads=2, bos_token_id=None, eos_token_id=0)


def novel(**options: Any) -> la.TextDataModule:
    given = {"vocab_size": 300, "block_size": 32, "batch_size": 4, "cache_dir": "cache"}
    return la.TextDataModule("pride_and_prejudice", **{**given, **options})


def rows(name: str, **columns: str) -> str:
    lines = [{column: f"{i} {text}" for column, text in columns.items()} for i in range(40)]
    Path(name).write_text("\n".join(map(json.dumps, lines)))
    return name


def tokenizer() -> Any:
    data = novel()
    data.prepare_data()
    data.setup("fit")
    return data.tokenizer


def pretrain(**options: Any) -> Parts:
    """A strategy or an optimizer besides, without a word about it in the module."""
    optimizer = options.pop("optimizer", None)
    return la.PretrainModule(config(), optimizer=optimizer), novel(), options


def callbacks() -> Parts:
    """Nothing held out, and whatever of ours draws, writes or watches."""
    ours = [
        la.MetricPlot(["train_loss", "lr"]),
        la.SavePretrained("saved"),
        la.AsyncCheckpoint("checkpoints", every_n_train_steps=2),
        la.GenerateSamples(["It is"], every_n_train_steps=2, max_new_tokens=4),
        la.SpikeGuard(),
    ]
    return la.PretrainModule(config()), novel(val_fraction=0.0), {"callbacks": ours}


def sft() -> Parts:
    data = la.ConversationDataModule(
        rows("sft.jsonl", prompt="was", completion=" happy."),
        tokenizer(),
        batch_size=4,
        max_length=32,
        val_fraction=0.2,
    )
    return la.PretrainModule(config()), data, {}


def dpo() -> Parts:
    data = la.PreferenceDataModule(
        rows("pairs.jsonl", prompt="was", chosen=" happy.", rejected=" sad."),
        tokenizer(),
        batch_size=4,
        max_length=32,
        val_fraction=0.2,
    )
    return la.DPOModule("saved"), data, {}


FITS: dict[str, Callable[[], Parts]] = {
    "pretrain": pretrain,
    "callbacks": callbacks,
    "sft": sft,
    "dpo": dpo,  # of the folder that `callbacks` has saved
    "lisa": lambda: pretrain(callbacks=[la.LISA(activated_layers=2, interval_steps=2)]),
    "galore": lambda: pretrain(optimizer=partial(la.GaLoreAdamW, lr=1e-3, rank=8)),
    "zero_infinity": lambda: pretrain(strategy="zero_infinity", **CPU),
    "ddp": lambda: pretrain(strategy="ddp_fork", accelerator="cpu", devices=2),
    "pipeline": lambda: pretrain(
        strategy=la.PipelineStrategy(start_method="fork"), accelerator="cpu", devices=2
    ),
}


def main(names: list[str]) -> None:
    """Fit each, validate it, and say which it was."""
    for name in names or FITS:
        sys.stderr.write(f"== {name}\n")
        module, data, options = FITS[name]()
        each = {"max_steps": 4, "val_check_interval": 2, "limit_val_batches": 2, **options}
        trainer = pl.Trainer(log_every_n_steps=1, default_root_dir=name, **each)
        trainer.fit(module, data)
        trainer.validate(module, data, verbose=False)


if __name__ == "__main__":
    main(sys.argv[1:])
