"""The one map of a model: embedding, blocks, final norm, head, and what the head does."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.layers.find import find_layers
    from lightning_align.layers.head import Head
    from lightning_align.layers.hugging_face import is_hugging_face
    from lightning_align.layers.map import ModelLayers
    from lightning_align.layers.recompute import checkpoint_blocks
else:
    _HOMES = {
        "Head": "head",
        "ModelLayers": "map",
        "checkpoint_blocks": "recompute",
        "find_layers": "find",
        "is_hugging_face": "hugging_face",
    }
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = ["Head", "ModelLayers", "checkpoint_blocks", "find_layers", "is_hugging_face"]
