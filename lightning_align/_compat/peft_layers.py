"""Layers of PEFT, which are switched off without a word on which of their parameters train.

PEFT's own ``enable_adapters`` also makes every parameter of an adapter frozen, and then trainable.
In the middle of a step, whose gradients are on their way, and beside parameters that the user has
frozen, neither may be touched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def peft_layers(model: nn.Module) -> dict[str, Any]:
    """What PEFT has put into a model, by name: layers with adapters, and modules trained whole."""
    # Nobody has such layers without having imported peft, so we need not import it.
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    others: Any = sys.modules.get("peft.utils.other")
    if tuners is None or others is None:
        return {}
    kinds = (tuners.BaseTunerLayer, others.AuxiliaryTrainingWrapper)
    return {name: part for name, part in model.named_modules() if isinstance(part, kinds)}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """A model as if PEFT had put nothing into it, for a while."""
    layers = list(peft_layers(model).values())
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state
