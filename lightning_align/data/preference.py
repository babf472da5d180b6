"""Preference pairs: a prompt, the completion that was chosen and the one that was rejected.

A batch has the chosen completions in its first half of rows and the rejected ones, in the same
order, in its second: one forward pass serves both (as in TRL's DataCollatorForPreference).

Shapes: P pairs in a batch, R = 2 P rows, T tokens in the longest row.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_align.data import held_out
from lightning_align.data.files import InputFile
from lightning_align.data.pair_formats import Pair, PairReader
from lightning_align.data.sampler import padding
from lightning_align.data.samples import Ids, read_samples
from lightning_align.data.tokenizer import pad_token_id


class PreferenceDataset(Dataset[dict[str, Tensor]]):
    """Pairs in memory; indexed with a *list* of indices, it returns a batch.

    A padding index of the sampler gives the pair that it names with an empty completion mask: no
    token counts, so the pair must not either. A real pair has completion tokens in both rows.

    Args:
        pairs: What ``read_pairs`` returned.
        pad_token_id: Token that fills up shorter rows, on the right.
        first_number: Number of the first pair among all of a run.
    """

    def __init__(self, pairs: Sequence[Pair], pad_token_id: int, first_number: int = 0) -> None:
        self.pairs = pairs
        self.pad_token_id = pad_token_id
        self.first_number = first_number

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of the pairs ``indices``, with the ``number`` of each pair, (P,)."""
        places = [index if index >= 0 else padding(index) for index in indices]
        batch = collate_pairs([self.pairs[place] for place in places], self.pad_token_id)
        batch["number"] = torch.tensor(places) + self.first_number
        empty_P = torch.tensor([index < 0 for index in indices])
        batch["completion_mask"][empty_P.repeat(2)] = 0
        return batch

    def completions(self) -> list[tuple[tuple[Ids, Ids], ...]]:
        """Prompt and completion of each row that a pair has in a batch: chosen, rejected."""
        return [((p.prompt, p.chosen), (p.prompt, p.rejected)) for p in self.pairs]

    @property
    def content(self) -> str:
        """Hash of all tokens, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for pair in self.pairs:
            digest.update(np.array([len(ids) for ids in pair]).tobytes())
            digest.update(b"".join(ids.tobytes() for ids in pair))
        return digest.hexdigest()


def collate_pairs(pairs: Sequence[Pair], pad_token_id: int) -> dict[str, Tensor]:
    """Rows [chosen; rejected], filled up on the right.

    Returns:
        ``input_ids``, ``attention_mask`` (1 on tokens) and ``completion_mask`` (1 on the tokens of
        the completion), each (2 P, T).
    """
    rows = [(pair.prompt, pair.chosen) for pair in pairs]
    rows += [(pair.prompt, pair.rejected) for pair in pairs]
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
    files: Sequence[InputFile], tokenizer: Any, *, max_length: int, append_eos: bool
) -> list[Pair]:
    """All usable pairs of files, tokenised and cut to ``max_length``.

    Pairs that can teach nothing are dropped: a prompt that fills ``max_length`` or is empty, an
    empty completion, two completions that are the same. One warning counts them.

    Args:
        files: Files of records with the columns prompt, chosen and rejected, in any of the forms
            of ``pair_formats``.
        tokenizer: A transformers tokenizer.
        max_length: Tokens that prompt and completion may have together; the completion is cut.
        append_eos: Whether to close each completion that is text with the end-of-text token.

    Raises:
        ValueError: If a file holds no such records, or no pair is left.
    """
    reader = PairReader(tokenizer, append_eos)

    def usable(file: InputFile) -> Iterator[Pair | str]:
        for pair in reader.read(file):
            yield pair if isinstance(pair, str) else _fit(pair, max_length)

    pairs = read_samples(files, usable, "pairs")
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


def pair_dataset(pairs: Sequence[Pair], tokenizer: Any, first_number: int) -> PreferenceDataset:
    """The dataset of ``pairs``, filled up with the tokenizer's own token."""
    return PreferenceDataset(pairs, pad_token_id(tokenizer), first_number)


def _fit(pair: Pair, max_length: int) -> Pair | str:
    """The pair as it is trained on, or why it cannot be."""
    if len(pair.prompt) == 0:
        return "the prompt is empty"
    room = max_length - len(pair.prompt)
    if room <= 0:
        return f"the prompt has max_length={max_length} tokens or more"
    chosen, rejected = pair.chosen[:room], pair.rejected[:room]
    if np.array_equal(chosen, rejected):
        return "chosen and rejected are the same (up to max_length)"
    if len(chosen) == 0 or len(rejected) == 0:
        return "chosen or rejected is empty"
    return Pair(pair.prompt, chosen, rejected)
