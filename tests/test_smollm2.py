"""A real language model through the whole job: load, generate, one step of each, export, reload.

SmolLM2-135M-Instruct, dequantised from 4 bits (tests/helpers/smollm2.py). Needs PyPI once.
"""

import csv
import json
import lzma
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_align import (
    ConversationDataModule,
    DPOModule,
    PreferenceDataModule,
    PretrainModule,
)
from lightning_align.cli.export import main as export
from lightning_align.data.corpora import embedded_path
from lightning_align.demo.pairs import make_pairs, write_jsonl
from tests.helpers.smollm2 import SAMPLING, smollm2_folder

pytestmark = pytest.mark.slow

GENESIS = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and"
    " void; and darkness was upon the face of the deep. And the Spirit of God moved upon the face"
    " of the waters."
)
CONVERSATIONS = [
    [
        {"role": "user", "content": "What is the capital of Italy?"},
        {"role": "assistant", "content": "Rome."},
        {"role": "user", "content": "And of France?"},
        {"role": "assistant", "content": "Paris."},
    ],
    [
        {"role": "user", "content": "Who wrote Pride and Prejudice?"},
        {"role": "assistant", "content": "Jane Austen wrote it; it was published in 1813."},
    ],
]


@pytest.fixture(scope="module")
def folder() -> str:
    return str(smollm2_folder())


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def module(folder: str) -> PretrainModule:
    """As it was loaded; tests that train load their own."""
    return PretrainModule(folder)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """Gigabytes that pytest would keep for three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def fit(
    module: pl.LightningModule, data: pl.LightningDataModule, scratch: Path, steps: int
) -> tuple[pl.Trainer, list[dict[str, float]]]:
    """Train; what was logged at each step."""
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=CSVLogger(str(scratch), name="", version="logs"),
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    with (scratch / "logs/metrics.csv").open() as lines:
        logged = list(csv.DictReader(lines))
    return trainer, [{name: float(value) for name, value in row.items()} for row in logged]


def small_steps(parameters: Any) -> torch.optim.Optimizer:
    """The default rate is made for random weights, and would undo what these have learned."""
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)


def logits(model: Any, tokenizer: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer(GENESIS, return_tensors="pt")).logits


def test_generates_what_it_has_learned(module: PretrainModule, tokenizer: Any) -> None:
    prompt = tokenizer("The capital of Italy is", return_tensors="pt")
    answer = module.model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(answer) == " Rome"


def test_knows_the_bible(module: PretrainModule, tokenizer: Any) -> None:
    """Wrong rotary order or a wrong head makes thousands of it, not ten."""
    ids = tokenizer(GENESIS, return_tensors="pt").input_ids
    nll = module.eval().predict_step({"input_ids": ids, "labels": ids}, 0)
    module.train()
    assert nll.exp().item() < 20
    # The chunked head against transformers' own loss, over 49,152 tokens in fp32.
    theirs = module.model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(nll[0], theirs, rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def tuned(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two steps of supervised fine-tuning on two conversations: module, log, checkpoint."""
    scratch = tmp_path_factory.mktemp("tuned")
    lines = [json.dumps({"messages": messages}) for messages in CONVERSATIONS]
    (scratch / "chats.jsonl").write_text("\n".join(lines))
    data = ConversationDataModule(
        str(scratch / "chats.jsonl"), folder, batch_size=2, max_length=128, assistant_only_loss=True
    )
    module = PretrainModule(folder, optimizer=small_steps)
    trainer, log = fit(module, data, scratch, steps=2)
    trainer.save_checkpoint(scratch / "tuned.ckpt", weights_only=True)
    yield module, log, scratch / "tuned.ckpt"
    shutil.rmtree(scratch)


def test_fine_tuning_learns_the_assistants_answers(tuned: Any, tokenizer: Any) -> None:
    _, (first, second), _ = tuned
    assert second["train_loss"] < first["train_loss"]
    # An instruct model knows what answers look like; over 49,152 tokens at random it were 10.8.
    assert first["train_loss"] < 5
    # Only the assistant's words and the token that closes each answer are learned.
    answers = [turn["content"] for turns in CONVERSATIONS for turn in turns[1::2]]
    learned = sum(len(tokenizer.encode(answer)) + 1 for answer in answers)
    assert learned <= first["tokens_seen"] <= learned + 2 * len(answers)


def test_saved_folder_answers_as_the_module_does(
    tuned: Any, module: PretrainModule, tokenizer: Any, scratch: Path
) -> None:
    trained = tuned[0]
    trained.save_pretrained(str(scratch))
    reloads_as(trained, scratch, tokenizer)
    # And it is not what training began with.
    assert not torch.allclose(logits(trained.model, tokenizer), logits(module.model, tokenizer))


def test_exported_checkpoint_answers_as_the_module_does(
    tuned: Any, tokenizer: Any, scratch: Path
) -> None:
    trained, _, checkpoint = tuned
    export(["--ckpt", str(checkpoint), "--output", str(scratch / "exported")])
    reloads_as(trained, scratch / "exported", tokenizer)


def reloads_as(trained: PretrainModule, folder: Path, tokenizer: Any) -> None:
    """Assert that the folder has everything that the trained module had."""
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours = logits(trained.model, tokenizer)
    torch.testing.assert_close(logits(theirs, tokenizer), ours, rtol=1e-5, atol=1e-5)
    assert theirs.config.tie_word_embeddings
    for name, value in SAMPLING.items():
        assert getattr(theirs.generation_config, name) == value
    again = AutoTokenizer.from_pretrained(folder)
    chat = CONVERSATIONS[0]
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False
    )
    assert again.encode(GENESIS) == tokenizer.encode(GENESIS)
    assert again.eos_token == tokenizer.eos_token == "<|im_end|>"


def test_dpo_learns_the_author_from_the_models_own_samples(
    folder: str, tokenizer: Any, scratch: Path
) -> None:
    """The step-0 loss is log 2, as policy and reference are the same; one step improves it."""
    module = DPOModule(folder, optimizer=small_steps)
    with lzma.open(embedded_path("pride_and_prejudice"), "rt", encoding="utf-8") as text:
        novel = np.array(tokenizer.encode(text.read(20_000)))
    sizes = {"prompt_tokens": 24, "completion_tokens": 24}
    pairs = make_pairs(module.model, tokenizer, [novel], num_pairs=4, batch_size=4, **sizes)
    write_jsonl(pairs, scratch / "pairs.jsonl")
    data = PreferenceDataModule(
        scratch / "pairs.jsonl", folder, batch_size=4, max_length=64, append_eos=False
    )
    _, (first, second) = fit(module, data, scratch, steps=2)
    # fp32 log-probabilities of 24 tokens: the two models differ in the last bits at most.
    assert first["train_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert 0 <= first["rewards/accuracies"] <= 1
    assert second["train_loss"] < first["train_loss"]
    assert second["rewards/margins"] > 0
    assert second["rewards/accuracies"] == 1
    assert first["tokens_seen"] == 4 * 2 * 24
