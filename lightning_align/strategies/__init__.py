"""Where tensors live: strategies for ``Trainer(strategy=...)``."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.strategies.pipeline import PipelineStrategy
else:
    _HOMES = {"PipelineStrategy": "pipeline"}
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = ["PipelineStrategy"]
