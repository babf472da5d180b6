"""Optimizers: one object holds matrix groups and AdamW groups, and its state is plain tensors."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.optimizers.galore import GaLoreAdamW
    from lightning_align.optimizers.muon import Muon
    from lightning_align.optimizers.param_groups import build_param_groups
    from lightning_align.optimizers.stable_adamw import StableAdamW
else:
    _HOMES = {
        "GaLoreAdamW": "galore",
        "Muon": "muon",
        "StableAdamW": "stable_adamw",
        "build_param_groups": "param_groups",
    }
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = [
    "GaLoreAdamW",
    "Muon",
    "StableAdamW",
    "build_param_groups",
]
