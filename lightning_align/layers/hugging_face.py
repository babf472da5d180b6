"""What models of transformers have in common, without importing it, and how a forward is called."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn


def is_hugging_face(model: nn.Module) -> bool:
    """Whether it is a model of transformers."""
    # Nobody has such a model without having imported transformers, so we need not import it.
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def no_cache(model: nn.Module) -> dict[str, bool]:
    """Arguments that keep a forward from filling a cache of keys and values."""
    return {"use_cache": False} if is_hugging_face(model) else {}


def base_model(model: Any) -> nn.Module | None:
    """The decoder below the head of a Hugging Face model, None where we must find out."""
    if not is_hugging_face(model) or model.base_model is model:
        return None
    return model.base_model  # type: ignore[no-any-return]


@cache
def argument_names(forward: Callable[..., Any]) -> frozenset[str]:
    """Its named arguments. ``**kwargs`` does not count: it would be ignored in silence."""
    return frozenset(inspect.signature(forward).parameters)
