"""Preference pairs from plain text: the author's continuation over the model's own sample.

That is SPIN's construction (arXiv:2401.01335). Honest: both continuations have the same number of
tokens in the tokenizer's canonical spelling, neither contains an end-of-text token, and every text
tokenises back to exactly these tokens, so that neither length nor spelling gives the answer away.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_align._errors import argument_error
from lightning_align.models.sampling import continue_prompts

Tokens = npt.NDArray[np.integer[Any]]
SPARE_TOKENS = 8  # sampled beyond the completion, because re-tokenising a sample may merge tokens


def make_pairs(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Tokens],
    *,
    num_pairs: int,
    prompt_tokens: int = 64,
    completion_tokens: int = 48,
    batch_size: int = 64,
    seed: int = 0,
) -> list[dict[str, str]]:
    """Sample passages and let the model continue them.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Turns documents and continuations into text and, to check, back into tokens.
        documents: Token ids of each document; a passage never crosses two of them.
        num_pairs: Pairs wanted.
        prompt_tokens: Length of each prompt.
        completion_tokens: Length of each chosen and each rejected continuation.
        batch_size: Prompts continued at a time.
        seed: Seed of the passages and of the samples.

    Returns:
        Pairs of texts under ``prompt``, ``chosen`` and ``rejected``.

    Raises:
        ValueError: If no document is long enough, samples would be longer than the model's rows, or
            too few of them survive tokenising again.
    """
    new_tokens = completion_tokens + SPARE_TOKENS
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and prompt_tokens + new_tokens > longest:
        rule = f"a sample of {prompt_tokens + new_tokens} tokens, {SPARE_TOKENS} of them to spare"
        rule += f", leaves the {longest} positions of the model, behind which it writes anything"
        raise argument_error("make_pairs", "completion_tokens", completion_tokens, rule, "Lower it")
    was_training = model.training
    model.eval()
    torch.manual_seed(seed)
    passages = _passages(tokenizer, documents, prompt_tokens, completion_tokens, seed)
    pairs: list[dict[str, str]] = []
    with tqdm(total=num_pairs, desc="sampling pairs", unit="pair") as progress:
        for _ in range(20 * max(1, num_pairs // batch_size)):
            batch = [next(passages) for _ in range(batch_size)]
            prompts = [prompt.tolist() for prompt, _ in batch]
            rows = continue_without_end(model, tokenizer, prompts, new_tokens)
            for (prompt, chosen), row in zip(batch, rows["input_ids"].tolist(), strict=True):
                rejected = _canonical(tokenizer, row[prompt_tokens:], completion_tokens)
                if rejected is not None and len(pairs) < num_pairs:
                    texts = (tokenizer.decode(ids) for ids in (prompt, chosen, rejected))
                    pairs.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
                    progress.update()
            if len(pairs) == num_pairs:
                model.train(was_training)
                return pairs
    rule = f"only {len(pairs)} samples tokenise back to themselves"
    raise argument_error("make_pairs", "num_pairs", num_pairs, rule, "Ask for fewer")


def write_jsonl(rows: Sequence[dict[str, str]], path: Path) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def _passages(
    tokenizer: Any,
    documents: Sequence[Tokens],
    prompt_tokens: int,
    completion_tokens: int,
    seed: int,
) -> Iterator[tuple[Tokens, Tokens]]:
    """Random passages whose two parts both tokenise back to themselves, without end."""
    length = prompt_tokens + completion_tokens
    spans = [len(document) - length for document in documents]
    eligible = [index for index, span in enumerate(spans) if span > 0]
    if not eligible:
        rule = f"must be shorter than the longest document ({max(map(len, documents))} tokens)"
        raise argument_error("make_pairs", "prompt_tokens + completion_tokens", length, rule)
    weights = np.array([spans[index] for index in eligible], dtype=float)
    generator = np.random.default_rng(seed)
    while True:
        document = eligible[generator.choice(len(eligible), p=weights / weights.sum())]
        start = int(generator.integers(spans[document]))
        passage = documents[document][start : start + length]
        prompt, chosen = passage[:prompt_tokens], passage[prompt_tokens:]
        if tokenizer.eos_token_id not in passage and all(
            _canonical(tokenizer, part.tolist(), len(part)) is not None for part in (prompt, chosen)
        ):
            yield prompt, chosen


def _canonical(tokenizer: Any, ids: list[int], length: int) -> list[int] | None:
    """The first tokens as the tokenizer itself would write them; None if they are not stable."""
    spelled = tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False)[:length]
    again = tokenizer.encode(tokenizer.decode(spelled), add_special_tokens=False)
    return spelled if len(spelled) == length and again == spelled else None


def continue_without_end(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int
) -> dict[str, Tensor]:
    """Rows of plain samples at temperature 1, in which no text ends; see ``continue_prompts``."""
    return continue_prompts(
        model,
        prompts,
        max_new_tokens=new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        do_sample=True,
        top_k=0,
        suppress_tokens=[tokenizer.eos_token_id],
    )
