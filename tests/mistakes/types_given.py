"""A value of another type than the argument"s."""

import torch

import lightning_align as la
from lightning_align import data, losses
from tests.mistakes.desk import M

TYPES = [
    M("TextDataModule", "block_size", lambda d: d.text(block_size="many")),
    M(
        "AsyncCheckpoint",
        "train_time_interval",
        lambda d: la.AsyncCheckpoint(train_time_interval=60),
    ),
    M(
        "PretrainModule",
        "optimizer",
        lambda d: d.pretrain(optimizer=torch.optim.SGD([torch.ones(1)], 0.1)),
    ),
    M("DPOModule", "optimizer", lambda d: d.dpo(optimizer=3)),
    M("OptimizerSwap", "optimizer", lambda d: la.OptimizerSwap(la.Muon([torch.ones(2, 2)]))),
    M("OptimizerSwap", "lr_scheduler", lambda d: la.OptimizerSwap("AdamW", lr_scheduler=0.1)),
    M("PretrainModule", "model", lambda d: la.PretrainModule(3)),
    M("DPOModule", "beta", lambda d: d.dpo(beta="strong")),
    M("PretrainModule", "optimizer", lambda d: d.pretrain(optimizer=torch.nn.Linear)),
    M("PretrainModule", "optimizer", lambda d: d.fit(module=d.pretrain(optimizer=lambda p: None))),
    M("PretrainModule", "dtype", lambda d: d.pretrain(dtype=torch.bfloat16)),
    M("LISA", "activated_layers", lambda d: la.LISA(activated_layers=1.5)),
    M("MetricPlot", "metrics", lambda d: la.MetricPlot("train_loss")),
    M("GenerateSamples", "prompts", lambda d: la.GenerateSamples("Once upon")),
    M("SpikeGuard", "detector", lambda d: la.SpikeGuard(detector=3)),
    M("SpikeDetector", "window", lambda d: la.SpikeDetector(window=6.5)),
    M("Curriculum", "length", lambda d: la.Curriculum(length=64)),
    M("TokenSchedule", "max_tokens", lambda d: la.TokenSchedule(max_tokens=1e9)),
    M("RooflineMonitor", "every_n_steps", lambda d: la.RooflineMonitor(every_n_steps=None)),
    M("PreferenceDiagnostics", "kl_prompts", lambda d: la.PreferenceDiagnostics(kl_prompts="the")),
    M("ExactResume", "seed", lambda d: la.ExactResume(seed="today")),
    M(
        "PipelineStrategy",
        "num_microbatches",
        lambda d: la.PipelineStrategy(num_microbatches="four"),
    ),
    M("ZeROInfinityStrategy", "stage", lambda d: la.ZeROInfinityStrategy(stage="three")),
    M("GaLoreAdamW", "rank", lambda d: la.GaLoreAdamW([torch.ones(2, 2)], rank=0.5)),
    M("StableAdamW", "betas", lambda d: la.StableAdamW([torch.ones(2, 2)], betas=0.9)),
    M("HardwareSpec", "memory", lambda d: la.HardwareSpec(1e12, 1e9, memory=None)),
    M("ModelSpec", "num_layers", lambda d: la.ModelSpec("twelve", 64, 4, vocab_size=9, seq_len=9)),
    M("Planner", "hw", lambda d: la.Planner(8)),
    M(
        "ReferenceLoss ReferenceMargin",
        "batch_size",
        lambda d: losses.ReferenceMargin(d.pretrain().model, "a", batch_size="all"),
    ),
    M(
        "ConversationDataset",
        "pad_token_id",
        lambda d: data.ConversationDataset([], pad_token_id="<pad>"),
    ),
    M(
        "PreferenceDataset Pair",
        "pad_token_id",
        lambda d: data.PreferenceDataset([], pad_token_id=None),
    ),
    M("PackedDataset", "split", lambda d: data.PackedDataset("my text", 16, 0)),
    M("BucketedDataset", "split", lambda d: data.BucketedDataset([1, 2, 3], 16, 0)),
    M("StreamBatches", "stream", lambda d: data.StreamBatches(3, sizes=len)),
]
