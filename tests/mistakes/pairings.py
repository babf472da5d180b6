"""Parts that do not go together."""

from transformers import LlamaConfig

import lightning_align as la
from tests.laws.members import HandWritten
from tests.mistakes.desk import GROWING, IDS, LORA, SIZES, M, loader

PAIRINGS = [
    M("DPOModule TextDataModule", "datamodule", lambda d: d.fit(module=d.dpo())),
    M(
        "DPOModule ConversationDataModule",
        "datamodule",
        lambda d: d.fit(module=d.dpo(), data=d.chats()),
    ),
    M("PretrainModule PreferenceDataModule", "datamodule", lambda d: d.fit(data=d.pairs())),
    M(
        "DPOModule PreferenceDataModule",
        "datamodule",
        lambda d: d.fit(module=d.dpo(loss_type="kto"), data=d.pairs()),
    ),
    M(
        "DPOModule Labelled UnpairedDataset",
        "loss_type",
        lambda d: d.fit(module=d.dpo(), data=d.pairs(d.at("records.jsonl"))),
    ),
    M(
        "PretrainModule PipelineStrategy",
        "datamodule",
        lambda d: d.fit(data=d.pairs(), strategy="pipeline_1f1b"),
    ),
    M(
        "PretrainModule ZeROInfinityStrategy",
        "datamodule",
        lambda d: d.fit(data=d.pairs(), strategy="zero_infinity_cpu"),
    ),
    M("PretrainModule", "batch", lambda d: d.fit(data=loader({"tokens": IDS}))),
    M("PretrainModule", "batch", lambda d: d.fit(data=loader((IDS, IDS)))),
    M(
        "PretrainModule",
        "batch",
        lambda d: d.fit(data=loader({"input_ids": IDS, "labels": IDS[:, 1:]})),
    ),
    M(
        "DPOModule",
        "batch",
        lambda d: d.fit(module=d.dpo(), data=loader({"input_ids": IDS, "labels": IDS})),
    ),
    M(
        "PretrainModule ZeROInfinityStrategy",
        "batch",
        lambda d: d.fit(data=loader({"ids": IDS}), strategy="zero_infinity_cpu"),
    ),
    M(
        "PretrainModule PipelineStrategy",
        "batch",
        lambda d: d.fit(data=loader({"ids": IDS}), strategy="pipeline_1f1b"),
    ),
    M(
        "SavePretrained",
        "pl_module",
        lambda d: d.fit(la.SavePretrained(d.at("m")), module=HandWritten()),
    ),
    M(
        "GenerateSamples",
        "pl_module",
        lambda d: d.fit(la.GenerateSamples(["a"]), module=HandWritten()),
    ),
    M("LISA ModelLayers", "model", lambda d: d.fit(la.LISA(), module=HandWritten())),
    M("PreferenceDiagnostics", "", lambda d: d.fit(la.PreferenceDiagnostics())),
    M("LISA PretrainModule", "", lambda d: d.fit(la.LISA(1), module=d.pretrain(peft_config=LORA))),
    M("LISA PipelineStrategy", "", lambda d: d.fit(la.LISA(1), strategy="pipeline_1f1b")),
    M("PipelineStrategy", "", lambda d: d.fit(module=HandWritten(), strategy="pipeline_1f1b")),
    M(
        "PretrainModule",
        "model",
        lambda d: d.fit(module=d.pretrain(model=LlamaConfig(**{**SIZES, "vocab_size": 50}))),
    ),
    M(
        "DPOModule",
        "ref_model",
        lambda d: d.dpo(ref_model=LlamaConfig(**{**SIZES, "vocab_size": 50})),
    ),
    M(
        "Curriculum PreferenceDataModule",
        "",
        lambda d: d.fit(
            la.Curriculum(length={"mode": "truncate", "scheduler": GROWING}),
            module=d.dpo(),
            data=d.pairs(),
        ),
    ),
]
