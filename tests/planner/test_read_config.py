"""Configurations by folder, YAML and object."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, T5Config

from lightning_align.planner import ModelSpec

SIZES = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 77,
}


def test_a_folder_and_an_object_say_the_same(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES)
    config.save_pretrained(tmp_path)
    ours, theirs = (ModelSpec.from_config(given) for given in (config, tmp_path))
    assert ours == theirs
    assert (ours.seq_len, ours.kv_heads, ours.gated_ffn) == (77, 2, True)
    assert ModelSpec.from_config(config, seq_len=33).seq_len == 33


def test_a_run_says_its_model_and_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    lines = "\n".join(f"        {name}: {value}" for name, value in SIZES.items())
    path.write_text(
        "model:\n  init_args:\n    model:\n      class_path: transformers.LlamaConfig\n"
        f"      init_args:\n{lines}\ndata:\n  init_args:\n    block_size: 40\n"
    )
    spec = ModelSpec.from_config(path)
    assert spec == ModelSpec.from_config(LlamaConfig(**SIZES), seq_len=40)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: {}", r"has no model\.init_args\.model"),
        ("[", "cannot be read"),
        (
            "model: {init_args: {model: {class_path: my.Net}}}",
            r"its model is a my\.Net.*from_module",
        ),
    ],
)
def test_files_without_a_model_are_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        ModelSpec.from_config(path)


def test_sizes_that_a_configuration_does_not_have_are_refused(tmp_path: Path) -> None:
    """It would keep them, and have its default where the user thought to have said something."""
    path = tmp_path / "run.yaml"
    model = "{class_path: transformers.LlamaConfig, init_args: {hiden_size: 64}}"
    path.write_text(f"model: {{init_args: {{model: {model}}}}}")
    with pytest.raises(ValueError, match=r"has no hiden_size=64\. Did you mean hidden_size"):
        ModelSpec.from_config(path)


def test_no_tokens_are_no_default() -> None:
    with pytest.raises(ValueError, match="seq_len=0"):
        ModelSpec.from_config(LlamaConfig(**SIZES), seq_len=0)


@pytest.mark.slow
def test_encoders_are_refused() -> None:
    with pytest.raises(ValueError, match=r"config='T5Config'\): is no decoder that transformers"):
        ModelSpec.from_config(T5Config())


def test_what_is_no_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a Hugging Face name or folder"):
        ModelSpec.from_config(3)
