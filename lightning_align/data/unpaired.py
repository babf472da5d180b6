"""Unpaired records: a prompt, a completion, and whether somebody found it good.

A batch has, beside its rows, each prompt with the completion of the record before it, from which
KTO estimates how far policy and reference are apart (as in TRL, whose names the keys have).

Shapes: P records in a batch, T tokens in the longest row.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_align._declared import declared
from lightning_align._errors import check_least
from lightning_align.data import held_out
from lightning_align.data.chat_template import ChatTemplate, check_messages, read_tools
from lightning_align.data.columns import read_records
from lightning_align.data.files import InputFile
from lightning_align.data.sampler import padding
from lightning_align.data.samples import (
    Ids,
    Record,
    batches_of_one_format,
    close,
    common_length,
    read_samples,
)
from lightning_align.data.tokenizer import (
    encode,
    encode_completions,
    encode_prompts,
    pad_token_id,
)
from lightning_align.data.truncation import count_cut, cut_row

TEXTS = "a prompt, a completion and a label, the first two as text"
MESSAGES = "a prompt, a completion and a label, the first two as messages"
COLUMNS = ("prompt", "completion", "label")

# What a column of text, as CSV has it, may say for true and false.
_LABELS = {"true": True, "1": True, "false": False, "0": False}


class Labelled(NamedTuple):
    """The tokens of one record, and whether the completion is a good one."""

    prompt: Ids
    completion: Ids
    label: bool


@declared
class UnpairedDataset(Dataset[dict[str, Tensor]]):
    """Records in memory; indexed with a *list* of indices, it returns a batch.

    A padding index of the sampler gives the record that it names with empty completion masks: no
    token counts, so the record must not either.

    Args:
        records: What ``read_unpaired`` returned.
        pad_token_id: Token that fills up shorter rows, on the right.
        max_length: Tokens of a row, of a prompt and its own completion or that of another record.
        first_number: Number of the first record among all of a run.
        truncation_mode: keep_start or keep_end, what is left of a row that is longer.
    """

    def __init__(
        self,
        records: Sequence[Labelled],
        pad_token_id: int,
        max_length: int,
        first_number: int = 0,
        *,
        truncation_mode: str = "keep_start",
    ) -> None:
        check_least("UnpairedDataset", 1, max_length=max_length)
        self.records = records
        self.pad_token_id = pad_token_id
        self.max_length = max_length
        self.first_number = first_number
        self.truncation_mode = truncation_mode

    def __len__(self) -> int:
        """Number of records."""
        return len(self.records)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of the records ``indices``, with the ``number`` of each record, (P,)."""
        real = [index for index in indices if index >= 0]
        none = [padding(index) for index in indices if index < 0]
        records = [self.records[index] for index in real]
        batch = collate_unpaired(records, self.pad_token_id, *self._cut)
        if none:
            batch = _with_rows_of_none(batch, [self.records[i] for i in none], len(indices))
        return {**batch, "number": torch.tensor(real + none) + self.first_number}

    @property
    def _cut(self) -> tuple[int, str]:
        return self.max_length, self.truncation_mode

    def completions(self) -> list[tuple[tuple[Ids, Ids], ...]]:
        """Prompt and completion of the one row that a record has in a batch, beside the KL's."""
        return [(cut_row(r.prompt, r.completion, *self._cut),) for r in self.records]

    @property
    def content(self) -> str:
        """Hash of all tokens and labels, in order, and of the cut if there are rows to be cut."""
        digest = hashlib.blake2b(digest_size=16)
        longest = max((len(record.prompt) for record in self.records), default=0)
        longest += max((len(record.completion) for record in self.records), default=0)
        if longest > self.max_length:  # any completion may come to stand behind any prompt
            digest.update(f"{self.max_length} {self.truncation_mode}".encode())
        for record in self.records:
            sizes = [len(record.prompt), len(record.completion), int(record.label)]
            digest.update(np.array(sizes).tobytes())
            digest.update(record.prompt.tobytes() + record.completion.tobytes())
        return digest.hexdigest()


def collate_unpaired(
    records: Sequence[Labelled],
    pad_token_id: int,
    max_length: int,
    truncation_mode: str = "keep_start",
) -> dict[str, Tensor]:
    """Rows of records, cut to ``max_length`` and filled up on the right.

    Args:
        records: Records of the batch, in order.
        pad_token_id: Token that fills up shorter rows.
        max_length: Tokens of a row.
        truncation_mode: keep_start or keep_end, what is left of a row that is longer.

    Returns:
        ``input_ids``, ``attention_mask`` (1 on tokens) and ``completion_mask`` (1 on the tokens of
        the completion), each (P, T), and ``label``, (P,); and, each (P, T'), ``KL_input_ids``,
        ``KL_attention_mask`` and ``KL_completion_mask``, of each prompt with the completion of the
        record before it. A single record has no other, and its KL row no completion.
    """
    prompts = [record.prompt for record in records]
    completions = [record.completion for record in records]
    others = completions[-1:] + completions[:-1]
    batch: dict[str, Tensor] = {}
    for prefix, follows in (("", completions), ("KL_", others)):
        rows = [
            cut_row(prompt, completion, max_length, truncation_mode)
            for prompt, completion in zip(prompts, follows, strict=True)
        ]
        for name, values in _rows(rows, pad_token_id).items():
            batch[prefix + name] = values
    if len(records) == 1:
        batch["KL_completion_mask"] = torch.zeros_like(batch["KL_completion_mask"])
    return {**batch, "label": torch.tensor([record.label for record in records], dtype=torch.bool)}


def _rows(rows: Sequence[tuple[Ids, Ids]], pad_token_id: int) -> dict[str, Tensor]:
    prompt_P = np.array([len(prompt) for prompt, _ in rows], dtype=np.int64)
    length_P = prompt_P + np.array([len(completion) for _, completion in rows], dtype=np.int64)
    position_T = np.arange(length_P.max(initial=1))
    attention_PT = position_T < length_P[:, None]
    ids_PT = np.full(attention_PT.shape, pad_token_id, dtype=np.int64)
    for row_T, parts in zip(ids_PT, rows, strict=True):
        ids = np.concatenate(parts)
        row_T[: len(ids)] = ids
    return {
        "input_ids": torch.from_numpy(ids_PT),
        "attention_mask": torch.from_numpy(attention_PT.astype(np.int64)),
        "completion_mask": torch.from_numpy(
            (attention_PT & (position_T >= prompt_P[:, None])).astype(np.int64)
        ),
    }


def _with_rows_of_none(
    batch: dict[str, Tensor], none: Sequence[Labelled], size: int
) -> dict[str, Tensor]:
    """The batch filled up to ``size`` rows that are read but do not count.

    Among the others they would be somebody's other completion.
    """
    first = none[0].prompt[:1]
    token = int(first[0])
    filled = {}
    for name, values in batch.items():
        rows = torch.zeros(size, *values.shape[1:], dtype=values.dtype)
        rows[: len(values)] = values
        if "input_ids" in name:
            rows[len(values) :] = token
        if "attention_mask" in name:
            rows[len(values) :, 0] = 1
        filled[name] = rows
    return filled


def holds_unpaired(files: Sequence[InputFile]) -> bool:
    """Whether the first record has a completion and a label, and so is none of a pair."""
    known = (*COLUMNS, "chosen", "rejected")
    _, record = next(read_records(files[0], known), ("", {}))
    return {"completion", "label"} <= record.keys() and "chosen" not in record


def read_unpaired(
    files: Sequence[InputFile],
    tokenizer: Any,
    *,
    max_length: int,
    append_eos: bool,
    truncation_mode: str = "keep_start",
) -> list[Labelled]:
    """All usable records of files, tokenised.

    Records that can teach nothing are dropped: a prompt that is empty or, with keep_start, fills
    ``max_length``, an empty completion. One warning counts them, and the rows that will be cut,
    where a batch is made: for kto a completion stands behind another prompt, too.

    Args:
        files: Files of records with the columns prompt, completion and label; the label is true or
            false, 1 or 0.
        tokenizer: A transformers tokenizer.
        max_length: Tokens that prompt and completion may have together.
        append_eos: Whether to close each completion that is text with the end-of-text token.
        truncation_mode: keep_start or keep_end, what is left of a row that is longer.

    Raises:
        ValueError: If a file holds no such records, or no record is left.
    """
    eos_token_id: int | None = tokenizer.eos_token_id if append_eos else None
    torn: list[str] = []
    lost: Counter[str] = Counter()

    def usable(file: InputFile) -> Iterator[Labelled | str]:
        for form, records in batches_of_one_format(file, format_of, COLUMNS):
            read = _texts if form == TEXTS else _conversations
            for record in read(file, records, tokenizer, eos_token_id, torn):
                if isinstance(record, str):
                    yield record
                else:
                    yield _fit(record, max_length, truncation_mode, lost)

    samples = read_samples(files, usable, "records", lost)
    if torn:
        first = files[0]
        warnings.warn(
            f"{first.where}({first.argument}={first.url!r}): the tokens of {len(torn)} prompt(s),"
            f" first {torn[0]}, are no beginning of those of the whole conversations. The"
            " completions begin where the tokens part.",
            stacklevel=2,
        )
    return samples


def check_labels(file: InputFile, records: Sequence[Labelled]) -> None:
    """Refuse records to learn from that are all good or all bad: nothing tells the two apart.

    Raises:
        ValueError: If a label is missing.
    """
    labels = {record.label for record in records}
    if len(labels) == 1:
        rule = f"the label of all {len(records)} records to train on is {labels.pop()}"
        raise file.error(rule, "Both are needed; fine-tune on good completions alone instead")


def hold_out_prompts(
    where: str, records: Sequence[Labelled], val_fraction: float, seed: int
) -> tuple[list[Labelled], list[Labelled]]:
    """Records to learn from, and records held out; those with the same prompt stay together.

    Args:
        where: Class the user called.
        records: Records to divide.
        val_fraction: Part of the prompts to hold out, in [0, 1).
        seed: Seed of the draw.
    """
    prompts = [record.prompt.tobytes() for record in records]
    return held_out.hold_out_prompts(where, records, prompts, val_fraction, seed)


def unpaired_dataset(
    records: Sequence[Labelled],
    tokenizer: Any,
    max_length: int,
    first_number: int = 0,
    *,
    truncation_mode: str = "keep_start",
) -> UnpairedDataset:
    """The dataset of ``records``, filled up with the tokenizer's own token."""
    cut = max_length, first_number
    return UnpairedDataset(records, pad_token_id(tokenizer), *cut, truncation_mode=truncation_mode)


def format_of(file: InputFile, place: str, record: dict[str, Any]) -> str:
    """Whether a record is text or messages.

    Raises:
        ValueError: If it is neither, or its label is missing or neither true nor false.
    """
    for column in COLUMNS:
        if record.get(column) is None:
            raise file.missing_error(place, record, column)
    _label(file, place, record)
    if {type(record["prompt"]), type(record["completion"])} == {str, list}:
        raise file.error(f"{place}: prompt and completion must both be text or both be messages")
    return MESSAGES if isinstance(record["prompt"], list) else TEXTS


def _label(file: InputFile, place: str, record: dict[str, Any]) -> bool:
    label = record["label"]
    known = _LABELS.get(str(label).strip().lower())
    if known is None or not isinstance(label, (bool, int, str, np.bool_, np.integer)):
        rule = f"{place}: column 'label' must be true or false, or 1 or 0, not {label!r}"
        raise file.error(rule)
    return known


def _texts(
    file: InputFile, records: list[Record], tokenizer: Any, eos: int | None, _torn: list[str]
) -> Iterator[Labelled | str]:
    texts = [file.text_columns(place, record, COLUMNS[:2]) for place, record in records]
    prompts = encode_prompts(tokenizer, [text["prompt"] for text in texts])
    completions = encode_completions(tokenizer, [text["completion"] for text in texts])
    for (place, record), prompt, completion in zip(records, prompts, completions, strict=True):
        if not completion:
            yield "the completion is empty"
        else:
            label = _label(file, place, record)
            yield Labelled(close(prompt, None), close(completion, eos), label)


def _conversations(
    file: InputFile, records: list[Record], tokenizer: Any, _eos: int | None, torn: list[str]
) -> Iterator[Labelled | str]:
    """The whole is tokenised; the completion begins where it parts from the prompt."""
    template = ChatTemplate(file, tokenizer)
    for place, record in records:
        prompt = check_messages(file, place, "prompt", record["prompt"])
        completion = check_messages(file, place, "completion", record["completion"])
        tools = read_tools(file, place, record)
        texts = [
            template.render(place, prompt, tools, prompt=True),
            template.render(place, prompt + completion, tools),
        ]
        opening, whole = encode(tokenizer, texts)
        end = common_length(opening, whole)
        if end < len(opening):
            torn.append(f"{file.url}, {place}")
        label = _label(file, place, record)
        yield Labelled(close(whole[:end], None), close(whole[end:], None), label)


def _fit(
    record: Labelled, max_length: int, truncation_mode: str, lost: Counter[str]
) -> Labelled | str:
    """The record, or why it cannot be trained on."""
    row = record.prompt, record.completion
    if len(record.prompt) == 0:
        return "the prompt is empty"
    if truncation_mode == "keep_start" and len(record.prompt) >= max_length:
        return f"the prompt has max_length={max_length} tokens or more"
    if len(record.completion) == 0:
        return "the completion is empty"
    count_cut(lost, row, cut_row(*row, max_length, truncation_mode))
    return record
