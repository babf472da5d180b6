"""Tiny random decoders: every Hugging Face family we promise, and two modules written by hand.

Their weights are large, and so are the softcaps, scales and biases: with the default initialisation
the logits are so small that a forgotten softcap changes nothing, and a test would not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

VOCAB_SIZE = 101  # A prime, so that no width is mistaken for it.
HIDDEN_SIZE = 32
NUM_BLOCKS = 3
MAX_POSITIONS = 64

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROTARY = {
    **_COMMON,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}
_GPT2 = {
    **_COMMON,
    "n_embd": HIDDEN_SIZE,
    "n_layer": NUM_BLOCKS,
    "n_head": 4,
    "n_positions": MAX_POSITIONS,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_NEOX = {key: value for key, value in _ROTARY.items() if key != "num_key_value_heads"}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 0.5}
_OPT = {"word_embed_proj_dim": HIDDEN_SIZE, "ffn_dim": 48, "dropout": 0.0}


def _build(model_type: str, config: dict[str, Any], **overrides: Any) -> Any:
    """A model of that type, the same one each time, without moving the global generator."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = AutoConfig.for_model(model_type, **{**config, **overrides})
        model = AutoModelForCausalLM.from_config(settings)
        bias = model.get_output_embeddings().bias
        if bias is not None:
            nn.init.normal_(bias)
    return model.train()


# name -> builder without arguments; keyword arguments override the config. Dropout is 0.
TINY_MODELS: dict[str, Callable[..., Any]] = {
    name: partial(_build, model_type, config)
    for name, model_type, config in [
        ("llama", "llama", _ROTARY),
        ("llama_tied", "llama", {**_ROTARY, "tie_word_embeddings": True}),
        ("qwen2", "qwen2", _ROTARY),
        ("qwen3", "qwen3", {**_ROTARY, "head_dim": 8}),
        ("mistral", "mistral", _ROTARY),
        ("gpt2", "gpt2", _GPT2),
        ("gpt_neox", "gpt_neox", _NEOX),
        ("gemma2", "gemma2", {**_ROTARY, **_GEMMA}),
        ("gemma3", "gemma3_text", {**_ROTARY, **_GEMMA}),
        ("phi", "phi", _ROTARY),
        ("granite", "granite", {**_ROTARY, "logits_scaling": 8.0, "embedding_multiplier": 3.0}),
        ("cohere", "cohere", {**_ROTARY, "logit_scale": 0.25}),
        ("cohere2", "cohere2", {**_ROTARY, "logit_scale": 0.25}),
        ("olmo2", "olmo2", _ROTARY),
        ("stablelm", "stablelm", _ROTARY),
        ("starcoder2", "starcoder2", _ROTARY),
        ("opt", "opt", {**_ROTARY, **_OPT}),
        ("falcon", "falcon", {**_NEOX, "new_decoder_architecture": False}),
        ("mixtral", "mixtral", {**_ROTARY, "num_local_experts": 4}),
    ]
}

# An oddity, not a family we promise: no final norm, and no checkpointing of its own.
tiny_openai_gpt = partial(_build, "openai-gpt", _GPT2)


class CausalBlock(nn.Module):
    """Attention and MLP with a norm before each."""

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.norm_1(x_BTD)).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mask = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).tril()
        if mask_BT is not None:
            # Every token sees itself, so that the softmax of a padding row is defined.
            mask = mask & mask_BT.bool()[:, None, None] | torch.eye(
                T, dtype=torch.bool, device=x_BTD.device
            )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(*qkv, attn_mask=mask, dropout_p=dropout)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.mlp(self.norm_2(x_BTD))


class PlainDecoder(nn.Module):
    """Written by hand, untied, logits as a tensor, more positions than tokens."""

    def __init__(
        self,
        vocab_size: int = VOCAB_SIZE,
        width: int = HIDDEN_SIZE,
        num_blocks: int = NUM_BLOCKS,
        max_positions: int = 2 * VOCAB_SIZE,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.positions = nn.Embedding(max_positions, width)
        self.tokens = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(CausalBlock(width, 2, dropout) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, vocab_size)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        x_BTD = self.dropout(self.tokens(input_ids) + self.positions(position_ids))
        for layer in self.layers:
            x_BTD = layer(x_BTD, attention_mask)
        return self.to_logits(self.norm(x_BTD))


class TiedDecoder(nn.Module):
    """Written by hand, tied, logits in an object, in a ModuleDict, with what config says on top."""

    def __init__(
        self,
        vocab_size: int = VOCAB_SIZE,
        width: int = HIDDEN_SIZE,
        num_blocks: int = NUM_BLOCKS,
        max_positions: int = MAX_POSITIONS,
        dropout: float = 0.0,
        logit_scale: float = 1.0,
        final_logit_softcapping: float | None = None,
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            logit_scale=logit_scale, final_logit_softcapping=final_logit_softcapping
        )
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, width),
                "wpe": nn.Embedding(max_positions, width),
                "h": nn.ModuleList(CausalBlock(width, 2, dropout) for _ in range(num_blocks)),
                "ln_f": nn.RMSNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        nn.init.normal_(self.lm_head.weight, std=1 / math.sqrt(width))

    def forward(self, idx: Tensor) -> SimpleNamespace:
        positions = torch.arange(idx.shape[1], device=idx.device)
        x_BTD = self.transformer["wte"](idx) + self.transformer["wpe"](positions)
        for block in self.transformer["h"]:
            x_BTD = block(x_BTD)
        logits = self.lm_head(self.transformer["ln_f"](x_BTD)) * self.config.logit_scale
        cap = self.config.final_logit_softcapping
        return SimpleNamespace(logits=logits if cap is None else cap * torch.tanh(logits / cap))
