"""Sizes of models: parameters against real models, and what is refused."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lightning_align.planner import ModelSpec
from lightning_align.planner.model_spec import count


def llama(**more: Any) -> ModelSpec:
    sizes: dict[str, Any] = {"vocab_size": 211, "seq_len": 48, "gated_ffn": True, "bias": False}
    sizes |= {"norm_bias": False, "num_positions": 0, "tied_embeddings": False}
    return ModelSpec(3, 64, 8, 2, 176, **{**sizes, **more})


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_a_real_llama(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    held = sum(parameter.numel() for parameter in model.parameters())
    assert llama(tied_embeddings=tied).parameters == held
    assert ModelSpec.from_config(config, seq_len=48).parameters == held


def test_parameters_are_those_of_gpt2() -> None:
    ours = ModelSpec(12, 768, 12, vocab_size=50257, seq_len=1024)
    assert ours.parameters == 124_439_808  # as its own table has it
    theirs = ModelSpec.from_config(GPT2Config())
    assert theirs.parameters == ours.parameters
    assert theirs.dropout
    assert not ModelSpec.from_config(GPT2Config(resid_pdrop=0, attn_pdrop=0)).dropout


def test_gpt_has_twelve_squares_of_its_width_a_block() -> None:
    spec = ModelSpec(2, 32, 4, vocab_size=100, seq_len=16, bias=False)
    matrices = [shape for kind, shape in spec.block_shapes if kind == "matrices"]
    assert sum(rows * columns for rows, columns in matrices) == 12 * 32**2
    assert count(spec.block_shapes) == 12 * 32**2 + 4 * 32


def test_another_length_of_rows_leaves_the_model_as_it_is() -> None:
    spec = ModelSpec(2, 32, 4, vocab_size=100, seq_len=16)
    assert spec.with_seq_len(64).parameters == spec.parameters
    assert spec.with_seq_len(64).seq_len == 64


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"hidden_size": 64.0}, "hidden_size=64.0"),
        ({"num_heads": True}, "num_heads=True"),
        ({"seq_len": -1}, "seq_len=-1"),
        ({"num_heads": 7}, r"num_heads=7\): must divide hidden_size=64"),
        ({"num_kv_heads": 3}, r"num_kv_heads=3\): must divide num_heads=8"),
        ({"attention": "flash"}, r"attention='flash'\): must be 'fused' or 'unfused'"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], told: str) -> None:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 8, "vocab_size": 10, "seq_len": 8}
    with pytest.raises(ValueError, match=rf"ModelSpec\({told}"):
        ModelSpec(**{**sizes, **changes})
