"""The one map of a model: embedding, blocks, final norm, head, and what the head does."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.layers.find import (
        find_held_model,
        find_language_models,
        find_layers,
        kept_layers,
    )
    from lightning_align.layers.head import Head
    from lightning_align.layers.hugging_face import is_hugging_face
    from lightning_align.layers.map import ModelLayers
    from lightning_align.layers.parts import Parts, find_parts, parameter_names
    from lightning_align.layers.recompute import checkpoint_blocks
else:
    _HOMES = {
        "Head": "head",
        "ModelLayers": "map",
        "Parts": "parts",
        "checkpoint_blocks": "recompute",
        "find_held_model": "find",
        "find_language_models": "find",
        "find_layers": "find",
        "find_parts": "parts",
        "is_hugging_face": "hugging_face",
        "kept_layers": "find",
        "parameter_names": "parts",
    }
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = [
    "Head",
    "ModelLayers",
    "Parts",
    "checkpoint_blocks",
    "find_held_model",
    "find_language_models",
    "find_layers",
    "find_parts",
    "is_hugging_face",
    "kept_layers",
    "parameter_names",
]
