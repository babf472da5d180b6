"""Small decoders whose steps are analysed, and what their products come to in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.helpers.tiny_models import TINY_MODELS, PlainDecoder

BATCH, TOKENS = 2, 48


def loss_of(model: nn.Module, batch: int = BATCH, tokens: int = TOKENS) -> Callable[[], Tensor]:
    """A step's loss, on tokens that are where the model is."""
    device = next(model.parameters()).device
    ids = torch.zeros(batch, tokens + 1, dtype=torch.long, device=device)

    def loss() -> Tensor:
        given: Any = model(ids[:, :-1])
        logits = given if isinstance(given, Tensor) else given.logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return loss


def gpt() -> PlainDecoder:
    torch.manual_seed(0)
    return PlainDecoder(vocab_size=211, width=64, num_blocks=3)


def llama() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 211}
    return TINY_MODELS["llama"](**sizes, num_attention_heads=8, num_key_value_heads=2)


def gpt2() -> Any:
    """Tied. It would look for padding among the tokens, which those on meta cannot answer."""
    return TINY_MODELS["gpt2"](n_embd=64, n_head=4, vocab_size=211, pad_token_id=None)


# name -> model; multiplications and additions a token of its matrices; width of all its heads
CLOSED_FORMS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "gpt": (gpt, 3 * 64 * (3 + 1 + 3 + 3) * 64 + 64 * 211, 64),
    "llama": (llama, 3 * (64 * (64 + 2 * 16 + 64) + 3 * 64 * 176) + 64 * 211, 64),
    "gpt2": (gpt2, 3 * 64 * (3 + 1 + 4 + 4) * 64 + 64 * 211, 64),
}


def closed_form(name: str) -> tuple[int, int]:
    """FLOPs of forward and of backward with fused attention, of three blocks and a head.

    A matrix product has 2 FLOPs a weight and token, and two such in backward. Attention has two
    products of tokens x tokens x width in forward and five in backward.
    """
    _, weights, width = CLOSED_FORMS[name]
    matrices = 2 * weights * BATCH * TOKENS
    attention = 3 * BATCH * 2 * TOKENS * TOKENS * width
    return matrices + 2 * attention, 2 * matrices + 5 * attention
