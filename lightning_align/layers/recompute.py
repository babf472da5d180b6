"""Activations of a block recomputed in backward instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_align.layers.hugging_face import is_hugging_face
from lightning_align.layers.map import ModelLayers


def checkpoint_blocks(layers: ModelLayers) -> None:
    """Recompute the activations of each block in backward instead of keeping them.

    Active while a block is in training mode and gradients are enabled. Loss and gradients stay
    bit-identical, dropout included. Applying it twice is the same as once.

    Args:
        layers: Map of the model, whose blocks are changed in place.
    """
    model: Any = layers.model
    if is_hugging_face(model) and model.supports_gradient_checkpointing:
        # Their own blocks also keep the cache out of the recomputation.
        options = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:  # its name before transformers 5.23
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        # It also makes the embedding's output require gradients, which only reentrant
        # checkpointing needs and which would send backward through frozen blocks to the bottom.
        model.disable_input_require_grads()
        return
    for block in layers.blocks:
        attributes = vars(block)
        theirs = attributes.get("forward")
        if getattr(theirs, "func", None) is not _checkpointed_forward:
            # copy.deepcopy rebinds a partial to the copied block; a closure would keep this one.
            attributes["forward"] = partial(_checkpointed_forward, block, theirs)


def _checkpointed_forward(
    block: nn.Module, override: Callable[..., Any] | None, /, *args: Any, **kwargs: Any
) -> Any:
    """Forward of a checkpointed block: its class's, unless the block itself had an override."""
    forward = override or partial(type(block).forward, block)
    if block.training:  # Without gradients, checkpoint just calls.
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)
