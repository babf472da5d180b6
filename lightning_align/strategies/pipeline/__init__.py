"""Pipeline parallelism: the layers of a model on several devices, the batch in micro-batches."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.strategies.pipeline.strategy import PipelineStrategy
else:
    _HOMES = {"PipelineStrategy": "strategy"}
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = ["PipelineStrategy"]
