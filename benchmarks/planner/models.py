"""Models that the planner's benchmarks draw the sizes of."""

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def language_model(family: str, *, width: int, blocks: int, heads: int, vocabulary: int) -> Any:
    """A GPT-2 without dropout if the family is "gpt", and else a Llama with grouped queries."""
    torch.manual_seed(0)
    if family == "gpt":
        config = GPT2Config(
            vocab_size=vocabulary,
            n_embd=width,
            n_layer=blocks,
            n_head=heads,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return GPT2LMHeadModel(config)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)
