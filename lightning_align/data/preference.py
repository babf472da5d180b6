"""Preference pairs: a prompt, the completion that was chosen and the one that was rejected.

A batch has the chosen completions in its first half of rows and the rejected ones, in the same
order, in its second: one forward pass serves both (as in TRL's DataCollatorForPreference).

Shapes: P pairs in a batch, R = 2 P rows, T tokens in the longest row.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_align._declared import declared
from lightning_align.data import held_out
from lightning_align.data.files import InputFile
from lightning_align.data.pair_formats import Pair, PairReader
from lightning_align.data.sampler import padding
from lightning_align.data.samples import Ids, read_samples
from lightning_align.data.tokenizer import pad_token_id
from lightning_align.data.truncation import count_cut, cut_row


@declared
class PreferenceDataset(Dataset[dict[str, Tensor]]):
    """Pairs in memory; indexed with a *list* of indices, it returns a batch.

    A padding index of the sampler gives the pair that it names with an empty completion mask: no
    token counts, so the pair must not either. A real pair has completion tokens in both rows.

    Args:
        pairs: What ``read_pairs`` returned.
        pad_token_id: Token that fills up shorter rows, on the right.
        first_number: Number of the first pair among all of a run.
        max_length: Tokens of a row, the last of which are kept; None for all.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        pad_token_id: int,
        first_number: int = 0,
        *,
        max_length: int | None = None,
    ) -> None:
        self.pairs = pairs
        self.pad_token_id = pad_token_id
        self.first_number = first_number
        self.max_length = max_length

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of the pairs ``indices``, with the ``number`` of each pair, (P,)."""
        places = [index if index >= 0 else padding(index) for index in indices]
        pairs = [self.pairs[place] for place in places]
        batch = collate_pairs(pairs, self.pad_token_id, self.max_length)
        batch["number"] = torch.tensor(places) + self.first_number
        empty_P = torch.tensor([index < 0 for index in indices])
        batch["completion_mask"][empty_P.repeat(2)] = 0
        return batch

    def completions(self) -> list[tuple[tuple[Ids, Ids], ...]]:
        """Prompt and completion of each row that a pair has in a batch: chosen, rejected."""
        return [rows_of(pair, self.max_length) for pair in self.pairs]

    @property
    def content(self) -> str:
        """Hash of all tokens, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for pair in self.pairs:
            (prompt, chosen), (other, rejected) = rows_of(pair, self.max_length)
            parts = [prompt, chosen, rejected, *[other] * (len(other) != len(prompt))]
            digest.update(np.array([len(ids) for ids in parts]).tobytes())
            digest.update(b"".join(ids.tobytes() for ids in parts))
        return digest.hexdigest()


def rows_of(pair: Pair, max_length: int | None = None) -> tuple[tuple[Ids, Ids], ...]:
    """Prompt and completion of the chosen row and of the rejected one.

    Args:
        pair: The pair.
        max_length: Tokens of a row, the last of which are kept, so that the longer completion has
            less of the prompt; None for all.
    """
    rows = (pair.prompt, pair.chosen), (pair.prompt, pair.rejected)
    if max_length is None:
        return rows
    return tuple(cut_row(*row, max_length, "keep_end") for row in rows)


def collate_pairs(
    pairs: Sequence[Pair], pad_token_id: int, max_length: int | None = None
) -> dict[str, Tensor]:
    """Rows [chosen; rejected], filled up on the right.

    Args:
        pairs: Pairs of the batch, in order.
        pad_token_id: Token that fills up shorter rows.
        max_length: Tokens of a row, the last of which are kept; None for all.

    Returns:
        ``input_ids``, ``attention_mask`` (1 on tokens) and ``completion_mask`` (1 on the tokens of
        the completion), each (2 P, T).
    """
    chosen, rejected = zip(*(rows_of(pair, max_length) for pair in pairs), strict=True)
    rows = [*chosen, *rejected]
    prompt_R = np.array([len(prompt) for prompt, _ in rows])
    length_R = np.array([len(prompt) + len(completion) for prompt, completion in rows])
    position_T = np.arange(length_R.max())
    attention_RT = position_T < length_R[:, None]
    completion_RT = attention_RT & (position_T >= prompt_R[:, None])
    ids_RT = np.full(attention_RT.shape, pad_token_id, dtype=np.int64)
    ids_RT[attention_RT] = np.concatenate([ids for row in rows for ids in row])
    return {
        "input_ids": torch.from_numpy(ids_RT),
        "attention_mask": torch.from_numpy(attention_RT.astype(np.int64)),
        "completion_mask": torch.from_numpy(completion_RT.astype(np.int64)),
    }


def read_pairs(
    files: Sequence[InputFile],
    tokenizer: Any,
    *,
    max_length: int,
    append_eos: bool,
    truncation_mode: str = "keep_start",
) -> list[Pair]:
    """All usable pairs of files, tokenised and cut to ``max_length``.

    Pairs that can teach nothing are dropped: a prompt that is empty or, with keep_start, fills
    ``max_length``, an empty completion, two completions that are the same. One warning counts them,
    and the rows that are cut. With keep_end pairs stay whole: each of their rows is cut by itself,
    where a batch is made.

    Args:
        files: Files of records with the columns prompt, chosen and rejected, in any of the forms
            of ``pair_formats``.
        tokenizer: A transformers tokenizer.
        max_length: Tokens that prompt and completion may have together.
        append_eos: Whether to close each completion that is text with the end-of-text token.
        truncation_mode: keep_start or keep_end, what is left of a row that is longer.

    Raises:
        ValueError: If a file holds no such records, or no pair is left.
    """
    reader = PairReader(tokenizer, append_eos)
    lost: Counter[str] = Counter()

    def usable(file: InputFile) -> Iterator[Pair | str]:
        for pair in reader.read(file):
            if isinstance(pair, str):
                yield pair
            else:
                yield _fit(pair, max_length, truncation_mode, lost)

    pairs = read_samples(files, usable, "pairs", lost)
    if reader.torn:
        first = files[0]
        warnings.warn(
            f"{first.where}({first.argument}={first.url!r}): the tokens of {len(reader.torn)}"
            f" prompt(s), first {reader.torn[0]}, are no beginning of those of the whole"
            " conversations: a token reaches across, or the chat template writes a prompt in"
            " another way when an answer follows. The completions begin where the tokens part.",
            stacklevel=2,
        )
    return pairs


def hold_out_prompts(
    where: str, pairs: Sequence[Pair], val_fraction: float, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Pairs to learn from, and pairs held out; those with the same prompt stay together.

    Args:
        where: Class the user called.
        pairs: Pairs to divide.
        val_fraction: Part of the prompts to hold out, in [0, 1).
        seed: Seed of the draw.
    """
    prompts = [pair.prompt.tobytes() for pair in pairs]
    return held_out.hold_out_prompts(where, pairs, prompts, val_fraction, seed)


def pair_dataset(
    pairs: Sequence[Pair], tokenizer: Any, max_length: int, first_number: int = 0
) -> PreferenceDataset:
    """The dataset of ``pairs``, filled up with the tokenizer's own token."""
    pad = pad_token_id(tokenizer)
    return PreferenceDataset(pairs, pad, first_number, max_length=max_length)


def _fit(pair: Pair, max_length: int, truncation_mode: str, lost: Counter[str]) -> Pair | str:
    """The pair as it is trained on, or why it cannot be."""
    if len(pair.prompt) == 0:
        return "the prompt is empty"
    if truncation_mode == "keep_start" and len(pair.prompt) >= max_length:
        return f"the prompt has max_length={max_length} tokens or more"
    rows = rows_of(pair)
    kept = [cut_row(*row, max_length, truncation_mode) for row in rows]
    (_, chosen), (_, rejected) = kept
    if np.array_equal(chosen, rejected):  # and so what is left of the prompt before them
        return "chosen and rejected are the same (up to max_length)"
    if len(chosen) == 0 or len(rejected) == 0:
        return "chosen or rejected is empty"
    for row, cut in zip(rows, kept, strict=True):
        count_cut(lost, row, cut)
    return pair if truncation_mode == "keep_end" else Pair(pair.prompt, chosen, rejected)
