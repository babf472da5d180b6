"""Every decoder whose layers the tests find, tokens for them, and which operations they run."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.tiny_models import (
    HIDDEN_SIZE,
    NUM_BLOCKS,
    TINY_MODELS,
    VOCAB_SIZE,
    PlainDecoder,
    TiedDecoder,
)

CAPPED = {"logit_scale": 2.0, "final_logit_softcapping": 0.5}
MODELS = {
    **TINY_MODELS,
    "plain": PlainDecoder,
    "tied": TiedDecoder,
    "tied_capped": lambda: TiedDecoder(**CAPPED),
}


def tokens(rows: int = 2, length: int = 12, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def own_logits(model: nn.Module, *args: Tensor, **kwargs: object) -> Tensor:
    output = model(*args, **kwargs)
    return getattr(output, "logits", output)


class Outputs(TorchDispatchMode):
    """Every operation that runs, with the shape of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self.seen.append((func.__name__, tuple(output.shape)))
        return output


def tiny_bert(class_name: str) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.5,
    )
    return getattr(transformers, class_name)(config)
