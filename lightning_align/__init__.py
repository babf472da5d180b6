"""Training and aligning language models with PyTorch Lightning, one extension point at a time.

Public names load on first use: importing the package costs next to nothing, and neither Lightning
nor transformers is imported before something needs it.
"""

import importlib
from typing import TYPE_CHECKING

from lightning_align.strategies.registry import register_on_import

if TYPE_CHECKING:
    from lightning_align import checkpointing, data, layers, losses, pipelining, run
    from lightning_align.callbacks.async_checkpoint import AsyncCheckpoint
    from lightning_align.callbacks.generate_samples import GenerateSamples
    from lightning_align.callbacks.lisa import LISA
    from lightning_align.callbacks.metric_plot import MetricPlot
    from lightning_align.callbacks.optimizer_swap import OptimizerSwap
    from lightning_align.callbacks.save_pretrained import SavePretrained
    from lightning_align.callbacks.token_schedule import TokenSchedule
    from lightning_align.layers import ModelLayers, find_layers
    from lightning_align.modules.conversation_data import ConversationDataModule
    from lightning_align.modules.dpo import DPOModule
    from lightning_align.modules.preference_data import PreferenceDataModule
    from lightning_align.modules.pretrain import PretrainModule
    from lightning_align.modules.text_data import TextDataModule
    from lightning_align.optimizers.galore import GaLoreAdamW
    from lightning_align.optimizers.muon import Muon
    from lightning_align.optimizers.param_groups import build_param_groups
    from lightning_align.optimizers.stable_adamw import StableAdamW
    from lightning_align.run.exact_resume import ExactResume
    from lightning_align.strategies.pipeline import PipelineStrategy

__version__ = "0.1.0"

__all__ = [
    "LISA",
    "AsyncCheckpoint",
    "ConversationDataModule",
    "DPOModule",
    "ExactResume",
    "GaLoreAdamW",
    "GenerateSamples",
    "MetricPlot",
    "ModelLayers",
    "Muon",
    "OptimizerSwap",
    "PipelineStrategy",
    "PreferenceDataModule",
    "PretrainModule",
    "SavePretrained",
    "StableAdamW",
    "TextDataModule",
    "TokenSchedule",
    "build_param_groups",
    "checkpointing",
    "data",
    "find_layers",
    "layers",
    "losses",
    "pipelining",
    "run",
]

# Public name -> the module that defines it.
_HOMES = {
    "AsyncCheckpoint": "lightning_align.callbacks.async_checkpoint",
    "ConversationDataModule": "lightning_align.modules.conversation_data",
    "DPOModule": "lightning_align.modules.dpo",
    "ExactResume": "lightning_align.run.exact_resume",
    "GaLoreAdamW": "lightning_align.optimizers.galore",
    "GenerateSamples": "lightning_align.callbacks.generate_samples",
    "LISA": "lightning_align.callbacks.lisa",
    "MetricPlot": "lightning_align.callbacks.metric_plot",
    "ModelLayers": "lightning_align.layers",
    "Muon": "lightning_align.optimizers.muon",
    "OptimizerSwap": "lightning_align.callbacks.optimizer_swap",
    "PipelineStrategy": "lightning_align.strategies.pipeline",
    "PreferenceDataModule": "lightning_align.modules.preference_data",
    "PretrainModule": "lightning_align.modules.pretrain",
    "SavePretrained": "lightning_align.callbacks.save_pretrained",
    "StableAdamW": "lightning_align.optimizers.stable_adamw",
    "TextDataModule": "lightning_align.modules.text_data",
    "TokenSchedule": "lightning_align.callbacks.token_schedule",
    "build_param_groups": "lightning_align.optimizers.param_groups",
    "find_layers": "lightning_align.layers",
}
_ROOMS = ("checkpointing", "data", "layers", "losses", "pipelining", "run")


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # so that the next access is a plain attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_on_import()
