"""A path that is not there, or is something else than it must be."""

import lightning_align as la
from lightning_align import checkpointing, data, pipelining
from tests.mistakes.desk import M

PATHS = [
    M("TextDataModule", "paths", lambda d: d.fit(data=d.text("no/such.txt"))),
    M("TextDataModule", "val_paths", lambda d: d.fit(data=d.text(val_paths="x.txt"))),
    M("ConversationDataModule", "paths", lambda d: d.fit(data=d.chats("chat.jsonl"))),
    M(
        "PreferenceDataModule",
        "tokenizer",
        lambda d: d.fit(module=d.dpo(), data=d.pairs(tokenizer="no/tokenizer")),
    ),
    M("PretrainModule", "model", lambda d: d.pretrain(model="no/such/folder")),
    M("DPOModule", "ref_model", lambda d: d.dpo(ref_model="./reference")),
    M("SavePretrained", "dirpath", lambda d: d.fit(la.SavePretrained(d.write("afile", "")))),
    M("SavePretrained", "dirpath", lambda d: la.SavePretrained("s3://bucket/model")),
    M("AsyncCheckpoint", "dirpath", lambda d: d.fit(la.AsyncCheckpoint(d.write("a.txt", "")))),
    M(
        "SnapshotEngine",
        "dirpath",
        lambda d: checkpointing.SnapshotEngine(d.write("b.txt", "")).save({}, "a", 1),
    ),
    M("Manifest", "path", lambda d: checkpointing.load_checkpoint(d.at("nowhere"))),
    M(
        "ZeROInfinityStrategy",
        "nvme_path",
        lambda d: d.fit(strategy=la.ZeROInfinityStrategy(nvme_path=d.write("c.txt", ""))),
    ),
    M(
        "PipelineStrategy",
        "schedule_csv",
        lambda d: d.fit(strategy=la.PipelineStrategy(schedule_csv="my.csv")),
    ),
    M("TextDataModule", "cache_dir", lambda d: d.text(cache_dir="s3://bucket/cache")),
    M("SpikeGuard", "skip_list", lambda d: d.fit(la.SpikeGuard(skip_list="no.json"))),
    M("DifficultyIndex", "folder", lambda d: data.DifficultyIndex.open(d.at("nowhere"))),
    M(
        "DifficultyAnalyzer",
        "folder",
        lambda d: data.DifficultyAnalyzer([1, 2], {"n": abs}, "s3://a/b"),
    ),
    M("ReferenceCache", "url", lambda d: data.ReferenceCache("nonsense://a/b", {})),
    M("MetricPlot", "filename", lambda d: la.MetricPlot(filename="curves.txt")),
    M("Action", "path", lambda d: pipelining.read_schedule_csv("no.csv")),
]
