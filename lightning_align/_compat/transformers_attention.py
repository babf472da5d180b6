"""Which attention kernel a model of transformers uses, and another one for a while."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def attention_of(model: nn.Module) -> str | None:
    """Name of the kernel; None of a model that has no choice."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None)


@contextmanager
def eager_attention(models: Iterable[nn.Module]) -> Iterator[None]:
    """Attention as matrix products, written out, wherever there is a choice."""
    with ExitStack() as stack:
        for model in models:
            before, choose = attention_of(model), getattr(model, "set_attn_implementation", None)
            if before is not None and callable(choose):
                choose("eager")
                stack.callback(choose, before)
        yield
