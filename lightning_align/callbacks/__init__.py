"""Callbacks: WHEN something happens during a run."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.callbacks.async_checkpoint import AsyncCheckpoint
    from lightning_align.callbacks.curriculum import Curriculum
    from lightning_align.callbacks.generate_samples import GenerateSamples
    from lightning_align.callbacks.lisa import LISA
    from lightning_align.callbacks.metric_plot import MetricPlot
    from lightning_align.callbacks.optimizer_swap import OptimizerSwap
    from lightning_align.callbacks.preference_diagnostics import PreferenceDiagnostics
    from lightning_align.callbacks.roofline import RooflineMonitor
    from lightning_align.callbacks.save_pretrained import SavePretrained
    from lightning_align.callbacks.spikes.guard import SpikeGuard
    from lightning_align.callbacks.token_schedule import TokenSchedule
else:
    _HOMES = {
        "LISA": "lisa",
        "AsyncCheckpoint": "async_checkpoint",
        "Curriculum": "curriculum",
        "GenerateSamples": "generate_samples",
        "MetricPlot": "metric_plot",
        "OptimizerSwap": "optimizer_swap",
        "PreferenceDiagnostics": "preference_diagnostics",
        "RooflineMonitor": "roofline",
        "SavePretrained": "save_pretrained",
        "SpikeGuard": "spikes.guard",
        "TokenSchedule": "token_schedule",
    }
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = [
    "LISA",
    "AsyncCheckpoint",
    "Curriculum",
    "GenerateSamples",
    "MetricPlot",
    "OptimizerSwap",
    "PreferenceDiagnostics",
    "RooflineMonitor",
    "SavePretrained",
    "SpikeGuard",
    "TokenSchedule",
]
