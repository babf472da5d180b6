"""Several conversations in a row, so that short ones cost no filling; none sees another.

Rows are made once, of whole conversations, by best-fit decreasing, as in arXiv:2404.10830: from the
longest on, each goes into the row that it leaves the least room in. So a row is a function of the
conversations alone, and batch n one of (seed, n), as everywhere.

Shapes: B rows in a batch, T + 1 tokens in the longest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_align.data.conversation import content_of
from lightning_align.data.conversation_formats import Example
from lightning_align.data.packing import IGNORE_INDEX
from lightning_align.data.sampler import padding
from lightning_align.data.tokenizer import pad_token_id


class PackedConversations(Dataset[dict[str, Tensor]]):
    """Rows of several conversations; indexed with a *list* of indices, it returns a batch.

    A padding index of the sampler gives the row that it names with nothing to learn.

    Args:
        examples: What ``read_conversations`` returned.
        max_length: Tokens that a row may have; no conversation has more.
        pad_token_id: Token that fills up shorter rows, on the right.

    Attributes:
        rows: Numbers of the conversations in each row.
    """

    def __init__(self, examples: Sequence[Example], max_length: int, pad_token_id: int) -> None:
        self.examples = examples
        self.max_length = max_length
        self.pad_token_id = pad_token_id
        self.rows = pack_best_fit([len(example.ids) for example in examples], max_length)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of the rows ``indices``."""
        rows = [self.rows[index if index >= 0 else padding(index)] for index in indices]
        packed = [[self.examples[number] for number in row] for row in rows]
        batch = collate_packed(packed, self.pad_token_id)
        batch["labels"][torch.tensor([index < 0 for index in indices])] = IGNORE_INDEX
        return batch

    @property
    def content(self) -> str:
        """Hash of all tokens and of what is learned of them, in order, and how they are packed."""
        return f"{content_of(self.examples)}, rows of {self.max_length} tokens"


def pack_best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Best-fit decreasing: numbers of the items in each row, ascending.

    At most 11/9 of the fewest rows that would do, and one more (Johnson 1974,
    https://doi.org/10.1137/0203025); of conversations, which are many and short, hardly any more.

    Args:
        lengths: Of each item, from 1 to ``size``.
        size: Of a row.

    Example:
        >>> pack_best_fit([3, 6, 5, 2], 8)
        [[1, 3], [0, 2]]
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by the room that is left in them
    rooms: list[int] = []  # its keys, ascending
    for number in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[number]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, size
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(number)
        left = room - length
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(row)
    return [sorted(row) for row in rows]


def collate_packed(rows: Sequence[Sequence[Example]], pad_token_id: int) -> dict[str, Tensor]:
    """Rows of conversations, one behind the other, filled up on the right.

    Returns:
        ``input_ids``, ``labels`` (aligned with them; -100 where nothing is learned, and on the
        first token of each conversation, which follows none of its own) and ``position_ids``,
        which start again at 0 wherever a conversation or the filling begins, each (B, T + 1).
    """
    width = max(sum(len(example.ids) for example in row) for row in rows)
    ids_BT = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    labels_BT = np.full_like(ids_BT, IGNORE_INDEX)
    positions_BT = np.zeros_like(ids_BT)
    for row, *tensors in zip(rows, ids_BT, labels_BT, positions_BT, strict=True):
        _fill(row, *tensors)
    batch = {"input_ids": ids_BT, "labels": labels_BT, "position_ids": positions_BT}
    return {name: torch.from_numpy(value_BT) for name, value_BT in batch.items()}


def _fill(
    row: Sequence[Example],
    ids_T: NDArray[np.int64],
    labels_T: NDArray[np.int64],
    positions_T: NDArray[np.int64],
) -> None:
    begin = 0
    for ids, learned, _ in row:
        part = slice(begin, begin + len(ids))
        ids_T[part] = ids
        labels_T[part] = np.where(learned, ids, IGNORE_INDEX)
        labels_T[begin] = IGNORE_INDEX
        positions_T[part] = np.arange(len(ids))
        begin += len(ids)
    positions_T[begin:] = np.arange(len(ids_T) - begin)


def packed_conversations(
    examples: Sequence[Example], tokenizer: object, max_length: int
) -> PackedConversations:
    """The dataset of ``examples``, filled up with the tokenizer's own token."""
    return PackedConversations(examples, max_length, pad_token_id(tokenizer))
