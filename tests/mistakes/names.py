"""A name that is misspelt: of an argument, a choice, a column, a class."""

from functools import partial

import torch

import lightning_align as la
from lightning_align import data, losses, pipelining
from lightning_align.cli import AlignCLI
from tests.mistakes.desk import GROWING, M

NAMES = [
    M("AlignCLI", "--modl", lambda d: AlignCLI(args=["fit", "--modl=PretrainModule"])),
    M("LISA", "activated_layer", lambda d: la.LISA(activated_layer=2)),
    M("TextDataModule", "blocksize", lambda d: d.text(blocksize=3)),
    M("TextDataModule", "paths", lambda d: d.fit(data=d.text(text_column="body"))),
    M("DPOModule", "loss_type", lambda d: d.dpo(loss_type="sigmod")),
    M("PreferenceOptions", "loss_type", lambda d: losses.PreferenceOptions("dpo")),
    M("PretrainModule", "optimizer", lambda d: d.pretrain(optimizer="AdamV")),
    M("PretrainModule", "attn_implementation", lambda d: d.pretrain(attn_implementation="flash")),
    M("PretrainModule", "lr_scheduler", lambda d: d.pretrain(lr_scheduler="CosineAnnealingLR")),
    M("OptimizerSwap", "optimizer", lambda d: la.OptimizerSwap("Muonn")),
    M(
        "Muon",
        "optimizer.learning_rate",
        lambda d: d.pretrain(optimizer=partial(la.Muon, learning_rate=1.0)),
    ),
    M("Muon", "adjust_lr_fn", lambda d: la.Muon([torch.ones(2, 2)], adjust_lr_fn="adam")),
    M("GaLoreAdamW", "proj_type", lambda d: la.GaLoreAdamW([torch.ones(2, 2)], proj_type="diag")),
    M("LISA", "layers_attribute", lambda d: d.fit(la.LISA(layers_attribute="model.layerz"))),
    M("AsyncCheckpoint", "mode", lambda d: la.AsyncCheckpoint(mode="minimum")),
    M("MetricPlot", "metric", lambda d: la.MetricPlot(metric=["train_loss"])),
    M("TokenSchedule", "schedule", lambda d: la.TokenSchedule(100, schedule="cosin")),
    M("SpikeGuard", "action", lambda d: la.SpikeGuard("skipp")),
    M(
        "Curriculum",
        "length",
        lambda d: la.Curriculum(length={"mod": "reshape", "scheduler": GROWING}),
    ),
    M(
        "CurriculumScheduler",
        "schedule_type",
        lambda d: data.CurriculumScheduler({**GROWING, "schedule_type": "linear"}),
    ),
    M(
        "SelfPaced",
        "schedule_type",
        lambda d: data.SelfPaced({**GROWING, "schedule_type": "selfpaced"}),
    ),
    M("PipelineStrategy", "schedule", lambda d: la.PipelineStrategy(schedule="1F2B")),
    M("Schedule", "schedule", lambda d: pipelining.build_schedule("1F2B", 2, 4)),
    M(
        "ZeROInfinityStrategy",
        "offload_params_device",
        lambda d: la.ZeROInfinityStrategy(offload_params_device="disk"),
    ),
    M("Planner HardwareSpec", "name", lambda d: la.Planner("A1000")),
    M("ParallelSpec", "schedule", lambda d: la.ParallelSpec(schedule="2F1B")),
    M("PreferenceDataModule", "truncation_mode", lambda d: d.pairs(truncation_mode="keep")),
    M("RooflineMonitor", "hardware", lambda d: d.fit(la.RooflineMonitor(hardware="A1000"))),
    M(
        "ModelLayers Head",
        "layers_attribute",
        lambda d: la.find_layers(d.pretrain().model, "h.blocks"),
    ),
]
