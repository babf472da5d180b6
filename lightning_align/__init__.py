"""Training and aligning language models with PyTorch Lightning, one extension point at a time.

Public names load on first use: importing the package costs next to nothing, and neither Lightning
nor transformers is imported before something needs it. Each is also a name of its room
(``from lightning_align.callbacks import LISA``).
"""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy
from lightning_align._moved import find_moved
from lightning_align.strategies.registry import register_on_import

if TYPE_CHECKING:
    from lightning_align import (
        callbacks,
        checkpointing,
        data,
        layers,
        losses,
        modules,
        optimizers,
        pipelining,
        planner,
        run,
        strategies,
    )
    from lightning_align.callbacks import (
        LISA,
        AsyncCheckpoint,
        Curriculum,
        GenerateSamples,
        MetricPlot,
        OptimizerSwap,
        PreferenceDiagnostics,
        RooflineMonitor,
        SavePretrained,
        SpikeGuard,
        TokenSchedule,
    )
    from lightning_align.cli import AlignCLI
    from lightning_align.layers import ModelLayers, find_layers
    from lightning_align.modules import (
        ConversationDataModule,
        DPOModule,
        PreferenceDataModule,
        PretrainModule,
        TextDataModule,
    )
    from lightning_align.optimizers import GaLoreAdamW, Muon, StableAdamW, build_param_groups
    from lightning_align.planner import (
        GenerationCost,
        HardwareSpec,
        MachineBalance,
        ModelSpec,
        ParallelSpec,
        Plan,
        Planner,
        Reliability,
        StepReport,
        TimeToTrain,
        analyze_step,
        predict_generation,
        predict_step_time,
        time_to_train,
    )
    from lightning_align.run import ExactResume
    from lightning_align.stability import SpikeDetector
    from lightning_align.strategies import PipelineStrategy, ZeROInfinityStrategy
else:
    _HOMES = {
        "HardwareSpec": "planner",
        "AlignCLI": "cli",
        "LISA": "callbacks",
        "AsyncCheckpoint": "callbacks",
        "ConversationDataModule": "modules",
        "Curriculum": "callbacks",
        "DPOModule": "modules",
        "ExactResume": "run",
        "GaLoreAdamW": "optimizers",
        "GenerateSamples": "callbacks",
        "GenerationCost": "planner",
        "MetricPlot": "callbacks",
        "MachineBalance": "planner",
        "ModelLayers": "layers",
        "ModelSpec": "planner",
        "Muon": "optimizers",
        "OptimizerSwap": "callbacks",
        "ParallelSpec": "planner",
        "PipelineStrategy": "strategies",
        "Plan": "planner",
        "Planner": "planner",
        "PreferenceDataModule": "modules",
        "PreferenceDiagnostics": "callbacks",
        "PretrainModule": "modules",
        "Reliability": "planner",
        "RooflineMonitor": "callbacks",
        "SavePretrained": "callbacks",
        "SpikeDetector": "stability",
        "SpikeGuard": "callbacks",
        "StableAdamW": "optimizers",
        "StepReport": "planner",
        "TextDataModule": "modules",
        "TimeToTrain": "planner",
        "TokenSchedule": "callbacks",
        "ZeROInfinityStrategy": "strategies",
        "analyze_step": "planner",
        "build_param_groups": "optimizers",
        "callbacks": "callbacks",
        "checkpointing": "checkpointing",
        "data": "data",
        "find_layers": "layers",
        "layers": "layers",
        "losses": "losses",
        "modules": "modules",
        "optimizers": "optimizers",
        "pipelining": "pipelining",
        "planner": "planner",
        "predict_generation": "planner",
        "predict_step_time": "planner",
        "run": "run",
        "strategies": "strategies",
        "time_to_train": "planner",
    }
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__version__ = "0.1.0"

__all__ = [
    "LISA",
    "AlignCLI",
    "AsyncCheckpoint",
    "ConversationDataModule",
    "Curriculum",
    "DPOModule",
    "ExactResume",
    "GaLoreAdamW",
    "GenerateSamples",
    "GenerationCost",
    "HardwareSpec",
    "MachineBalance",
    "MetricPlot",
    "ModelLayers",
    "ModelSpec",
    "Muon",
    "OptimizerSwap",
    "ParallelSpec",
    "PipelineStrategy",
    "Plan",
    "Planner",
    "PreferenceDataModule",
    "PreferenceDiagnostics",
    "PretrainModule",
    "Reliability",
    "RooflineMonitor",
    "SavePretrained",
    "SpikeDetector",
    "SpikeGuard",
    "StableAdamW",
    "StepReport",
    "TextDataModule",
    "TimeToTrain",
    "TokenSchedule",
    "ZeROInfinityStrategy",
    "analyze_step",
    "build_param_groups",
    "callbacks",
    "checkpointing",
    "data",
    "find_layers",
    "layers",
    "losses",
    "modules",
    "optimizers",
    "pipelining",
    "planner",
    "predict_generation",
    "predict_step_time",
    "run",
    "strategies",
    "time_to_train",
]

find_moved(__name__)
register_on_import()
