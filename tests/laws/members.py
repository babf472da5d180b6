"""Every optimizer, callback, strategy, datamodule and module that must keep the laws.

Adding a member is one line in one of the lists at the end; all laws then run over it, alone and in
pairs, and docs/composition.md gains its row. A member is written as in YAML: a class path and its
arguments. In strings, ``{data}`` is the folder of the test material and ``{run}`` that of the run.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.nn import functional as F  # noqa: N812

VOCABULARY = 300


@dataclass(frozen=True, eq=False)
class Member:
    """One row of the matrix.

    Args:
        name: As docs/composition.md prints it.
        spec: ``{"class_path": ..., "init_args": ...}``; for a strategy what Trainer takes.
        batches: Modules and datamodules: the format of the batches, "text" or "pairs".
        sums: Modules: whether the loss of a step is a sum over its tokens or pairs; a mean weighs
            unequal batches wrongly, which is Lightning's default.
        neutral: Callbacks: whether training with it is bit-identical to training without.
        ranks: Strategies: how many ranks may share a batch.
        splits_batch: Strategies: whether each rank has a part of the batch, or all have all of it.
        refuses: Name of a member of another list, or "strategy, 2 ranks" -> what the error at
            ``setup`` must say.
        exempt: Name of a law that does not hold -> why. The tests show that it does not.
    """

    name: str
    spec: Any
    batches: str = "text"
    sums: bool = True
    neutral: bool = True
    ranks: int = 1
    splits_batch: bool = True
    refuses: Mapping[str, str] = field(default_factory=dict)
    exempt: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def spec(class_path: str, **init_args: Any) -> dict[str, Any]:
    """A class and its arguments as in YAML."""
    return {"class_path": class_path, "init_args": init_args}


def filled(value: Any, folders: Mapping[str, str]) -> Any:
    """``value`` with the names of folders put in."""
    if isinstance(value, str):
        for name, folder in folders.items():
            value = value.replace(f"{{{name}}}", folder)
    elif isinstance(value, dict):
        return {filled(key, folders): filled(item, folders) for key, item in value.items()}
    elif isinstance(value, list):
        return [filled(item, folders) for item in value]
    return value


def without_dropout(value: Any) -> Any:
    """The same, without dropout: ranks and micro-batches draw other masks than one big batch."""
    if not isinstance(value, dict):
        return value
    return {key: 0.0 if key in DROPOUT else without_dropout(item) for key, item in value.items()}


def class_of(described: Mapping[str, Any]) -> Any:
    module, _, name = described["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def build(described: Any, folders: Mapping[str, str]) -> Any:
    """What YAML describes, built by calling classes: no command line takes part."""
    if isinstance(described, dict) and "class_path" in described:
        arguments = {
            name: build(value, folders) for name, value in described.get("init_args", {}).items()
        }
        built = class_of(described)
        is_optimizer = issubclass(built, torch.optim.Optimizer)
        return partial(built, **arguments) if is_optimizer else built(**arguments)
    return filled(described, folders)


class HandWritten(pl.LightningModule):
    """A LightningModule that knows nothing of us: its own model, loss and optimizer."""

    def __init__(
        self, optimizer: OptimizerCallable = torch.optim.AdamW, dropout: float = 0.3
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(32, VOCABULARY)
        self.optimizer = optimizer

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = self.head(self.body(self.embedding(batch["input_ids"][:, :-1])))
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "lora_dropout")
GPT2 = spec(
    "transformers.GPT2Config",
    vocab_size=VOCABULARY,
    n_positions=48,
    n_embd=16,
    n_layer=2,
    n_head=2,
    bos_token_id=0,
    eos_token_id=0,
    resid_pdrop=0.1,
    embd_pdrop=0.1,
    attn_pdrop=0.1,
)
OURS = "lightning_align."
LORA = spec("peft.LoraConfig", r=2, lora_dropout=0.1, fan_in_fan_out=True)

MODULES = [
    Member("PretrainModule", spec(OURS + "PretrainModule", model=GPT2)),
    Member(
        "DPOModule",
        spec(OURS + "DPOModule", model=GPT2),
        batches="pairs",
        refuses={"pipeline": "its reference would have to run beside it"},
    ),
    Member(
        "hand-written",
        spec("tests.laws.members.HandWritten", dropout=0.3),
        sums=False,
        refuses={"pipeline": "cannot tell the chain of layers that stages are cut from"},
    ),
]

# Other losses of DPOModule. They differ in what the loss of a batch is made of alone, so they are
# asked whether they accumulate and resume, and are not paired with all else.
MIXTRAL = spec(
    "transformers.MixtralConfig",
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_local_experts=4,
    bos_token_id=0,
    eos_token_id=0,
)


def objective(
    name: str,
    why_not: str = "",
    model: Any = GPT2,
    refuses: Mapping[str, str] | None = None,
    **options: Any,
) -> Member:
    exempt = {"accumulates": why_not} if why_not else {}
    described = spec(OURS + "DPOModule", model=model, **options)
    batches = "records" if name in ("kto", "apo_zero_unpaired") else "pairs"
    refuses = {"Curriculum": "its rows end with what is learned, the answers", **(refuses or {})}
    called = f"DPOModule, {name}"
    return Member(called, described, batches=batches, refuses=refuses, exempt=exempt)


# These three are asked about callbacks and strategies, too (test_references.py).
CACHED = objective(
    "cached",
    precompute_ref_log_probs=True,
    ref_cache_dir="{data}/reference",
    refuses={
        "PreferenceDiagnostics": "its reference is released once it is precomputed",
    },
)
ADAPTED = objective(
    "LoRA",
    peft_config=LORA,
    refuses={
        "LISA": "it holds adapters of PEFT",
        "pipeline": "its reference would have to run beside it",
    },
)
FOLLOWED = objective(
    "TR-DPO",
    sync_ref_model=True,
    ref_model_sync_steps=2,
    refuses={
        "pipeline": "the weights of a reference do not change",
        "zero_infinity": "the weights of a reference do not change",
        "zero_infinity_cpu": "the weights of a reference do not change",
    },
)

OBJECTIVES = [
    objective("list", loss_type=["sigmoid", "sft", "orpo"], sft_mean="pairs", use_weighting=True),
    objective("options", loss_type="ipo", ld_alpha=0.5, length_alpha=0.1),
    CACHED,
    ADAPTED,
    FOLLOWED,
    objective("no reference", loss_type=["simpo", "cpo"]),
    objective("router off", model=MIXTRAL, router_aux_loss_coef=0.0),
    objective("sft", "it is a mean over the tokens of a batch", loss_type="sft"),
    objective("aot", "it sorts the pairs of a batch", loss_type="aot_unpaired", beta=5.0),
    objective("router", "it is a product of two means", model=MIXTRAL, router_aux_loss_coef=1.0),
    objective("apo_zero_unpaired", loss_type="apo_zero_unpaired", undesirable_weight=2.0),
    objective("kto", "its KL is estimated from a batch", loss_type="kto", beta=5.0),
]

TEXT = {
    "paths": "{data}/text.jsonl",
    "val_paths": "{data}/val.jsonl",
    "tokenizer": "{data}/tokenizer",
    "block_size": 16,
    "cache_dir": "{data}/cache",
}
MIXTURE = {"{data}/text.jsonl": 0.7, "{data}/val.jsonl": 0.3}

DATAMODULES = [
    Member("TextDataModule", spec(OURS + "TextDataModule", **TEXT)),
    Member(
        "TextDataModule, separate documents",
        spec(OURS + "TextDataModule", **TEXT, separate_documents=True),
    ),
    Member(
        "TextDataModule, mixture",
        spec(OURS + "TextDataModule", **{**TEXT, "paths": MIXTURE}),
        exempt={"every sample once, over the ranks": "its weight says how often"},
    ),
    Member(
        "ConversationDataModule",
        spec(
            OURS + "ConversationDataModule",
            paths="{data}/conversations.jsonl",
            tokenizer="{data}/tokenizer",
            max_length=40,
            val_fraction=0.2,
        ),
    ),
    Member(
        "ConversationDataModule, packing",
        spec(
            OURS + "ConversationDataModule",
            paths="{data}/answers.jsonl",
            tokenizer="{data}/tokenizer",
            max_length=48,
            packing=True,
            val_fraction=0.2,
        ),
    ),
    Member(
        "PreferenceDataModule",
        spec(
            OURS + "PreferenceDataModule",
            paths="{data}/pairs.jsonl",
            tokenizer="{data}/tokenizer",
            max_length=32,
            val_fraction=0.2,
        ),
        batches="pairs",
    ),
]

GROWING = {
    "min_difficulty": 4,
    "max_difficulty": 16,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 9, "difficulty_step": 4},
}

OPTIMIZERS = [
    Member(
        f"torch AdamW{name}",
        spec("torch.optim.AdamW", lr=3e-3, **settings),
        exempt={
            "a non-finite gradient is skipped": "it is written into the weights",
            "goes on after a gradient of 1e21": "its second moment stays infinite",
            "a state of other shapes is refused": "it is taken; our modules refuse the checkpoint",
        },
    )
    for name, settings in (("", {}), (", fused", {"fused": True}))
] + [
    Member("Muon", spec(OURS + "Muon", lr=3e-3, adjust_lr_fn="match_rms_adamw")),
    Member("StableAdamW", spec(OURS + "StableAdamW", lr=3e-3)),
    Member(
        "GaLoreAdamW",
        spec(OURS + "GaLoreAdamW", lr=3e-3, rank=2, update_proj_gap=2),
    ),
]

RECORDS = Member(
    "PreferenceDataModule, unpaired",
    spec(
        OURS + "PreferenceDataModule",
        paths="{data}/records.jsonl",
        tokenizer="{data}/tokenizer",
        max_length=40,
    ),
    batches="records",
)

CALLBACKS = [
    Member("ExactResume", spec(OURS + "ExactResume")),
    Member(
        "AsyncCheckpoint",
        spec(OURS + "AsyncCheckpoint", dirpath="{run}/checkpoints", every_n_train_steps=2),
    ),
    Member("MetricPlot", spec(OURS + "MetricPlot", metrics=["train_loss"])),
    Member(
        "TokenSchedule",
        spec(OURS + "TokenSchedule", max_tokens=900, warmup_tokens=200),
        neutral=False,
    ),
    Member(
        "SavePretrained",
        spec(OURS + "SavePretrained", dirpath="{run}/model"),
        refuses={"hand-written": "HandWritten'\\): holds no module with a save_pretrained method"},
    ),
    Member(
        "GenerateSamples",
        spec(
            OURS + "GenerateSamples",
            prompts=["the"],
            every_n_train_steps=3,
            max_new_tokens=4,
            tokenizer="{data}/tokenizer",
        ),
        refuses={
            "hand-written": "HandWritten'\\): holds no module with a generate method",
            "pipeline": "rank zero may not hold the whole model",
        },
    ),
    Member(
        "PreferenceDiagnostics",
        spec(
            OURS + "PreferenceDiagnostics",
            every_n_train_steps=2,
            kl_every_n_train_steps=3,
            kl_max_new_tokens=4,
            kl_prompts=["the", "of a"],
            tokenizer="{data}/tokenizer",
        ),
        refuses={
            "PretrainModule": "it trains no pairs that it tells of",
            "hand-written": "it trains no pairs that it tells of",
        },
    ),
    Member(
        "LISA",
        spec(OURS + "LISA", activated_layers=1, interval_steps=2, reactivation_warmup_steps=1),
        neutral=False,
        refuses={
            "hand-written": "cannot tell which list holds its blocks; candidates",
            "pipeline": "it does not follow when other blocks are frozen and released",
        },
    ),
    Member(
        "Curriculum",
        spec(OURS + "Curriculum", length={"mode": "reshape", "scheduler": GROWING}, filename=None),
        neutral=False,
        refuses={
            "DPOModule": "its rows end with what is learned, the answers",
            "ConversationDataModule": "its rows end with what is learned, the answers",
        },
    ),
    Member(
        "RooflineMonitor",
        spec(OURS + "RooflineMonitor", every_n_steps=2, hardware="xeon-8480", plot=False),
    ),
    Member(
        "SpikeGuard",
        spec(OURS + "SpikeGuard", action=["clip", "skip", "stop"]),
    ),
    Member(
        "OptimizerSwap",
        spec(OURS + "OptimizerSwap", optimizer=spec(OURS + "Muon", lr=3e-3, adamw_lr=1e-3)),
        neutral=False,
    ),
]

STRATEGIES = [
    Member("auto", "auto"),
    Member("ddp", "ddp_fork", ranks=2),
    Member(
        "pipeline",
        spec(OURS + "PipelineStrategy", schedule="1F1B", start_method="fork"),
        ranks=2,
        splits_batch=False,
    ),
    Member(
        "zero_infinity",
        spec(
            OURS + "ZeROInfinityStrategy",
            params_buffer_count=2,
            sub_group_size=1000,
            overwrite=True,  # a run that goes on from a checkpoint of its own
            start_method="fork",
        ),
        ranks=2,
    ),
    Member(
        "zero_infinity_cpu",
        spec(
            OURS + "ZeROInfinityStrategy",
            offload_params_device="cpu",
            offload_optimizer_device="cpu",
            sub_group_size=1000,
            start_method="fork",
        ),
        ranks=2,
    ),
]
