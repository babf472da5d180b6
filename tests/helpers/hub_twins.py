"""Hub models of recipes without the hub: their configurations, and tiny twins that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3Config

from lightning_align import recipes
from lightning_align.cli.given import over
from lightning_align.data.tokenizer import train_tokenizer

SENTENCE = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|endoftext|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768}
# As their config.json on the hub has them.
CONFIGS: dict[str, PretrainedConfig] = {
    "Qwen/Qwen2.5-0.5B": Qwen2Config(
        **_QWEN,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-3B": Qwen2Config(
        **_QWEN,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-8B-Base": Qwen3Config(
        **_QWEN,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    ),
}
VOCABULARY = 600


def save_configurations(folder: Path) -> None:
    """Put them where a name of the hub is found first: in folders of the working one."""
    for name, config in CONFIGS.items():
        config.save_pretrained(folder / name)


def save_twins(folder: Path) -> None:
    """Models of the same architectures that train in a second, with tokenizers, and data."""
    tokenizer = train_tokenizer([SENTENCE * 9], VOCABULARY)
    tokenizer.chat_template = TEMPLATE
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": 0,
    }
    for name, config in CONFIGS.items():
        given = {**sizes, "tie_word_embeddings": config.tie_word_embeddings}
        twin = type(config)(**given, **({"head_dim": 24} if config.model_type == "qwen3" else {}))
        AutoModelForCausalLM.from_config(twin).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "texts").mkdir()
    for number in range(20):
        (folder / f"texts/{number}.txt").write_text(SENTENCE * 30)
    for name, make in {"chats": _chat, "pairs": _pair}.items():
        rows = "".join(f"{json.dumps(make(number))}\n" for number in range(80))
        (folder / f"{name}.jsonl").write_text(rows)


def _chat(number: int) -> dict[str, Any]:
    said = [("user", f"Who is {number}?"), ("assistant", SENTENCE * 3)]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def _pair(number: int) -> dict[str, Any]:
    chosen, rejected = SENTENCE * 3, SENTENCE[3:] * 3
    return {"prompt": f"Who is {number}?", "chosen": chosen, "rejected": rejected}


def laid(layers: str) -> dict[str, Any]:
    """What the options of a row make: recipes over each other, and values over them."""
    content: dict[str, Any] = {}
    words = layers.split()
    for option, value in zip(words[::2], words[1::2], strict=True):
        if option == "-c":
            layer = yaml.safe_load(recipes.text(value))
        else:
            layer = yaml.safe_load(value)
            for key in reversed(option.removeprefix("--").split(".")):
                layer = {key: layer}
        content = over(content, layer)
    return content
