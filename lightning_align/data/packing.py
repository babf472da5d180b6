"""Fixed-size blocks of a long stream of tokens, without waste.

Block i holds tokens i*T to i*T + T, one more than it predicts: consecutive blocks share a token, so
that every token but the very first is predicted exactly once.

Shapes: B blocks in a batch, T predictions in a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_align.data.token_cache import TokenSplit

IGNORE_INDEX = -100  # the label that no loss is taken of, as everywhere in Hugging Face and torch


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Blocks of the tokens of a split; indexed with a *list* of indices, it returns a batch.

    The last block is filled up with ``pad_token_id`` under the label -100. A padding index of the
    sampler gives the block that it names, with nothing to predict.

    Args:
        split: Tokens, one document after the other.
        block_size: Predictions per block.
        pad_token_id: Token that fills up the last block.
    """

    def __init__(self, split: TokenSplit, block_size: int, pad_token_id: int) -> None:
        self.split = split
        self.block_size = block_size
        self.pad_token_id = pad_token_id

    def __len__(self) -> int:
        """Number of blocks."""
        return -(-(self.split.num_tokens - 1) // self.block_size)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of the blocks ``indices``: ``input_ids`` and ``labels``, each (B, T + 1)."""
        index_B = np.asarray(indices, dtype=np.int64)
        empty_B = index_B < 0
        block_B = np.where(empty_B, -(index_B + 1), index_B)
        position_BT = block_B[:, None] * self.block_size + np.arange(self.block_size + 1)
        beyond_BT = position_BT >= self.split.num_tokens
        position_BT[beyond_BT] = 0
        ids_BT = self.split.tokens[position_BT].astype(np.int64)
        ids_BT[beyond_BT] = self.pad_token_id
        labels_BT = np.where(beyond_BT | empty_B[:, None], IGNORE_INDEX, ids_BT)
        return {"input_ids": torch.from_numpy(ids_BT), "labels": torch.from_numpy(labels_BT)}
