"""Every recipe passes lightning-align check, as it is but for the models and data of the hub."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_align import recipes
from lightning_align.__main__ import main
from lightning_align.data.tokenizer import train_tokenizer

NOVEL = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|endoftext|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BASE = ["--model.model=base", "--data.tokenizer=base"]
PAIRS = [*BASE, "--data.paths=pairs.jsonl", "--data.val_paths=pairs.jsonl"]
ALONE = ["--trainer.devices=1", "--trainer.strategy=auto"]
# Layers below the recipe, and options in place of what is not here.
RECIPES: dict[str, tuple[list[str], list[str]]] = {
    "curriculum": (["pretrain"], []),
    "ddp": ([], ALONE),
    "dpo": ([], PAIRS),
    "dpo_cached": ([], BASE),
    "dpo_lora": ([], BASE),
    "dpo_simpo": ([], BASE),
    "finetune_hub": ([], [*BASE, "--data.block_size=16", "--data.val_fraction=0.25"]),
    "dpo_hub": ([], BASE),
    "galore": (["pretrain"], []),
    "galore_hub": (["sft_chat"], [*BASE, "--data.val_fraction=0.2"]),
    "gpus_8": (["sft_chat"], [*BASE, "--data.val_fraction=0.2", "--trainer.accelerator=gpu"]),
    "host_memory": (["sft_chat"], [*BASE, "--data.val_fraction=0.2"]),
    "kto": ([], [*BASE, "--data.paths=records.jsonl"]),
    "lisa": (["sft_chat"], [*BASE, "--data.val_fraction=0.2"]),
    "muon": (["ddp"], ALONE),
    "preference_diagnostics": (
        ["dpo"],
        PAIRS,
    ),
    "pretrain": ([], []),
    "roofline": (["pretrain"], ["--trainer.callbacks.hardware=cpu"]),
    "sft_chat": ([], [*BASE, "--data.val_fraction=0.2"]),
    "size_3b": (["sft_chat"], [*BASE, "--data.val_fraction=0.2"]),
    "size_8b": (["sft_chat"], [*BASE, "--data.val_fraction=0.2"]),
    "spike_guard": (["pretrain"], []),
    "stable_adamw": (["ddp"], ALONE),
    "zero_infinity": ([], ["--model.model.num_hidden_layers=2"]),
    "zero_infinity_dpo": (
        [],
        PAIRS,
    ),
}
ELSEWHERE = {"curriculum_difficulty"}  # needs an index, which takes a command of its own


def base_model(folder: Path) -> None:
    """What stands in for the hub's model."""
    tokenizer = train_tokenizer([NOVEL * 9], 300)
    tokenizer.chat_template = TEMPLATE
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 0}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def test_every_recipe_is_here() -> None:
    assert {*recipes.names()} == {*RECIPES} | ELSEWHERE


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of tokens: the same novel is read by most of them."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in RECIPES if n not in ELSEWHERE])
def test_a_recipe_passes(
    name: str,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-align"])
    monkeypatch.setenv("LIGHTNING_ALIGN_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    base_model(tmp_path / "base")
    pairs = [{"prompt": f"{n} is", "chosen": " truth", "rejected": " a lie"} for n in range(40)]
    lines(tmp_path / "pairs.jsonl", pairs)
    records = [{"prompt": f"{n} is", "completion": " it", "label": n % 2 == 1} for n in range(40)]
    lines(tmp_path / "records.jsonl", records)
    said = [[("user", f"What is {n}?"), ("assistant", "A truth.")] for n in range(20)]
    chats = [[{"role": role, "content": text} for role, text in each] for each in said]
    lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    (tmp_path / "texts").mkdir()
    for i in range(4):
        (tmp_path / f"texts/{i}.txt").write_text(NOVEL * 30)
    below, options = RECIPES[name]
    layers = []
    for each in [*below, name]:
        main(["recipes", "copy", each])
        layers += ["-c", f"{each}.yaml"]
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    main(["check", *layers, "--trainer.accelerator=cpu", *options])
    assert capsys.readouterr().out.endswith("nothing is refused\n")
    assert set(tmp_path.rglob("*")) == before
