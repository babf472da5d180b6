"""Pairs are honest: same token count, canonical spelling, no end of text, reproducible."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_align import TextDataModule
from lightning_align.demo.pairs import continue_without_end, make_pairs, write_jsonl
from lightning_align.demo.run import documents, longer_text_accuracy, token_split

PROMPT, COMPLETION = 8, 12


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextDataModule:
    data = TextDataModule(vocab_size=512, block_size=32, cache_dir=tmp_path_factory.mktemp("cache"))
    data.setup()
    return data


ROWS = {"max_position_embeddings": PROMPT + COMPLETION + 8}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=0,
        )
    ).train()


def made(text: TextDataModule, model: Any, **options: Any) -> list[dict[str, str]]:
    split = documents(token_split(text.train_dataset))
    options = {"num_pairs": 12, "batch_size": 8, **options}
    sizes = {"prompt_tokens": PROMPT, "completion_tokens": COMPLETION}
    return make_pairs(model, text.tokenizer, split, **{**sizes, **options})


def test_both_continuations_have_the_same_tokens_count_and_no_end_cue(
    text: TextDataModule, model: Any
) -> None:
    pairs = made(text, model)
    assert len(pairs) == 12
    for pair in pairs:
        ids = {name: text.tokenizer.encode(value) for name, value in pair.items()}
        assert len(ids["prompt"]) == PROMPT
        assert len(ids["chosen"]) == len(ids["rejected"]) == COMPLETION
        assert all(0 not in tokens for tokens in ids.values())
        assert all(text.tokenizer.decode(ids[name]) == pair[name] for name in pair)


def test_prompt_and_chosen_stand_together_in_the_novel(text: TextDataModule, model: Any) -> None:
    tokens = token_split(text.train_dataset).tokens
    novel = text.tokenizer.decode(tokens)
    for pair in made(text, model):
        assert pair["prompt"] + pair["chosen"] in novel
        assert pair["prompt"] + pair["rejected"] not in novel


def test_seed_decides_and_the_mode_of_the_model_is_kept(text: TextDataModule, model: Any) -> None:
    assert made(text, model, seed=1) == made(text, model, seed=1)
    assert made(text, model, seed=1) != made(text, model, seed=2)
    assert model.training


def test_samples_never_end_the_text(model: Any, text: TextDataModule) -> None:
    with torch.no_grad():
        model.lm_head.weight[0] += 10.0 * model.lm_head.weight.std()
    prompts = torch.randint(1, 512, (4, PROMPT)).tolist()
    rows = continue_without_end(model, text.tokenizer, prompts, COMPLETION)
    assert rows["completion_mask"].sum() == 4 * COMPLETION
    new = rows["input_ids"][:, PROMPT:]
    assert new.shape == (4, COMPLETION)
    assert not (new == 0).any()


def test_documents_shorter_than_a_passage_are_refused(text: TextDataModule, model: Any) -> None:
    with pytest.raises(ValueError, match=r"completion_tokens=20\): must be shorter than"):
        make_pairs(
            model,
            text.tokenizer,
            [np.arange(5)],
            num_pairs=1,
            prompt_tokens=PROMPT,
            completion_tokens=COMPLETION,
        )


def test_samples_beyond_the_rows_of_the_model_are_refused(text: TextDataModule, model: Any) -> None:
    """What it has never been trained on is no text of it: 8 tokens are sampled to spare."""
    short = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), **ROWS}))
    assert len(made(text, short)) == 12
    with pytest.raises(ValueError, match=r"completion_tokens=13\): a sample of .* Lower it"):
        made(text, short, completion_tokens=COMPLETION + 1)


def test_jsonl_reads_back(tmp_path: Path) -> None:
    rows = [{"prompt": "a\n", "chosen": "“b”", "rejected": "c"}]
    write_jsonl(rows, tmp_path / "new/pairs.jsonl")
    lines = (tmp_path / "new/pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_length_rule_counts_a_tie_as_one_half() -> None:
    """Longer, shorter, equal: (1 + 0 + 1/2) / 3."""
    pairs = [
        {"chosen": "aa", "rejected": "a"},
        {"chosen": "a", "rejected": "aa"},
        {"chosen": "a", "rejected": "b"},
    ]
    assert longer_text_accuracy(pairs) == 0.5
