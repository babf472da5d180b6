"""Conversations of which the assistant's side is learned: a dataset in memory, and its batches.

Shapes: B conversations in a batch, T + 1 tokens in the longest.
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

from lightning_align._declared import declared
from lightning_align.data.conversation_formats import ConversationReader, Example
from lightning_align.data.files import InputFile
from lightning_align.data.held_out import hold_out_prompts
from lightning_align.data.packing import IGNORE_INDEX
from lightning_align.data.sampler import padding
from lightning_align.data.samples import read_samples
from lightning_align.data.tokenizer import pad_token_id


@declared
class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Conversations in memory; indexed with a *list* of indices, it returns a batch.

    A padding index of the sampler gives the conversation that it names with nothing to learn.

    Args:
        examples: What ``read_conversations`` returned.
        pad_token_id: Token that fills up shorter rows, on the right.
    """

    def __init__(self, examples: Sequence[Example], pad_token_id: int) -> None:
        self.examples = examples
        self.pad_token_id = pad_token_id

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self.examples)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of the conversations ``indices``."""
        examples = [self.examples[index if index >= 0 else padding(index)] for index in indices]
        batch = collate_conversations(examples, self.pad_token_id)
        batch["labels"][torch.tensor([index < 0 for index in indices])] = IGNORE_INDEX
        return batch

    @property
    def content(self) -> str:
        """Hash of all tokens and of what is learned of them, in order."""
        return content_of(self.examples)


def content_of(examples: Sequence[Example]) -> str:
    """Hash of the tokens of conversations and of what is learned of them, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(np.int64(len(example.ids)).tobytes())
        digest.update(example.ids.tobytes() + example.learned.tobytes())
    return digest.hexdigest()


def collate_conversations(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Rows filled up on the right.

    Returns:
        ``input_ids``, ``labels`` (aligned with them; -100 where nothing is learned) and
        ``attention_mask`` (1 on tokens), each (B, T + 1).
    """
    length_B = np.array([len(example.ids) for example in examples])
    attention_BT = np.arange(length_B.max()) < length_B[:, None]
    ids_BT = np.full(attention_BT.shape, pad_token_id, dtype=np.int64)
    ids_BT[attention_BT] = np.concatenate([example.ids for example in examples])
    learned_BT = np.zeros_like(attention_BT)
    learned_BT[attention_BT] = np.concatenate([example.learned for example in examples])
    return {
        "input_ids": torch.from_numpy(ids_BT),
        "labels": torch.from_numpy(np.where(learned_BT, ids_BT, IGNORE_INDEX)),
        "attention_mask": torch.from_numpy(attention_BT.astype(np.int64)),
    }


def read_conversations(
    files: Sequence[InputFile],
    tokenizer: Any,
    *,
    max_length: int,
    assistant_only_loss: bool = True,
    append_eos: bool = True,
) -> list[Example]:
    """All usable conversations of files, tokenised and cut to ``max_length``.

    Conversations of which nothing is learned are dropped, and one warning counts them.

    Args:
        files: Files of records with the column messages, or prompt and completion, in any of the
            forms of ``conversation_formats``.
        tokenizer: A transformers tokenizer, with a chat template if there are messages.
        max_length: Tokens that a conversation may have; the end is cut.
        assistant_only_loss: Whether the assistant's tokens alone are learned, or all.
        append_eos: Whether to close each completion that is text with the end-of-text token.

    Raises:
        ValueError: If a file holds no such records, or no conversation is left.
    """
    reader = ConversationReader(tokenizer, assistant_only_loss, append_eos)

    def usable(file: InputFile) -> Iterator[Example | str]:
        for example in reader.read(file):
            yield example if isinstance(example, str) else _fit(example, max_length)

    examples = read_samples(files, usable, "conversations")
    if reader.unclosed:
        first = files[0]
        warnings.warn(
            f"{first.where}({first.argument}={first.url!r}): in {len(reader.unclosed)}"
            f" conversation(s), first {reader.unclosed[0]}, no special token ends what the"
            " assistant says, so the model does not learn to stop. Let the chat template write one"
            " after each answer, before {% endgeneration %} if it has that.",
            stacklevel=2,
        )
    return examples


def hold_out_conversations(
    where: str, examples: Sequence[Example], val_fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Conversations to learn from, and those held out; with the same prompt they stay together.

    Args:
        where: Class the user called.
        examples: Conversations to divide.
        val_fraction: Part of the prompts to hold out, in [0, 1).
        seed: Seed of the draw.
    """
    prompts = [example.prompt for example in examples]
    return hold_out_prompts(where, examples, prompts, val_fraction, seed)


def conversation_dataset(examples: Sequence[Example], tokenizer: Any) -> ConversationDataset:
    """The dataset of ``examples``, filled up with the tokenizer's own token."""
    return ConversationDataset(examples, pad_token_id(tokenizer))


def _fit(example: Example, max_length: int) -> Example | str:
    """The conversation as it is trained on, or why it cannot be."""
    ids, learned = example.ids[:max_length], example.learned[:max_length]
    if not learned[1:].any():  # the first token follows none, so it is never predicted
        return f"nothing to learn is left within max_length={max_length} tokens"
    return Example(ids, learned, example.prompt)
