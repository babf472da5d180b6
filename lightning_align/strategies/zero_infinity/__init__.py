"""ZeRO-Infinity: parameters, gradients and optimizer state on NVMe, a few blocks in memory."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.strategies.zero_infinity.strategy import ZeROInfinityStrategy
else:
    _HOMES = {"ZeROInfinityStrategy": "strategy"}
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = ["ZeROInfinityStrategy"]
