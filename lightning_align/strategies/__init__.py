"""Where tensors live: strategies for ``Trainer(strategy=...)``."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.strategies.pipeline import PipelineStrategy
    from lightning_align.strategies.zero_infinity import ZeROInfinityStrategy
else:
    _HOMES = {"PipelineStrategy": "pipeline", "ZeROInfinityStrategy": "zero_infinity"}
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = ["PipelineStrategy", "ZeROInfinityStrategy"]
