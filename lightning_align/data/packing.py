"""Fixed-size blocks of a long stream of tokens, without waste.

Block i holds tokens i*T to i*T + T, one more than it predicts: consecutive blocks share a token, so
that every token but the very first is predicted exactly once. With separate documents the first
token of a document is not predicted either: it would be from the end of another one.

Shapes: B blocks in a batch, T predictions in a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_align._declared import declared
from lightning_align.data.token_cache import TokenSplit

IGNORE_INDEX = -100  # the label that no loss is taken of, as everywhere in Hugging Face and torch


@declared
class PackedDataset(Dataset[dict[str, Tensor]]):
    """Blocks of the tokens of a split; indexed with a *list* of indices, it returns a batch.

    The last block is filled up with ``pad_token_id`` under the label -100. A padding index of the
    sampler gives the block that it names, with nothing to predict.

    Args:
        split: Tokens, one document after the other.
        block_size: Predictions per block.
        pad_token_id: Token that fills up the last block.
        separate_documents: Whether a batch also says, as ``position_ids``, where in its document
            each token is, counted from where the document or the block begins.
        corpora: Number of tokens of each corpus, in the order of the tokens; no block reaches from
            one into the next. None is a single corpus.

    Attributes:
        sizes: Number of blocks of each corpus.
    """

    def __init__(
        self,
        split: TokenSplit,
        block_size: int,
        pad_token_id: int,
        *,
        separate_documents: bool = False,
        corpora: Sequence[int] | None = None,
    ) -> None:
        self.split = split
        self.block_size = block_size
        self.pad_token_id = pad_token_id
        self.separate_documents = separate_documents
        tokens_C = np.array([split.num_tokens] if corpora is None else corpora, dtype=np.int64)
        self.sizes: list[int] = (-(-(tokens_C - 1) // block_size)).tolist()
        self._last_token_C = np.cumsum(tokens_C)
        self._last_block_C = np.cumsum(self.sizes)

    def __len__(self) -> int:
        """Number of blocks."""
        return int(self._last_block_C[-1])

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of the blocks ``indices``: ``input_ids`` and ``labels``, each (B, T + 1)."""
        index_B = np.asarray(indices, dtype=np.int64)
        empty_B = index_B < 0
        begin_B, end_B = self._tokens_of(np.where(empty_B, -(index_B + 1), index_B))
        token_BT = begin_B[:, None] + np.arange(self.block_size + 1)
        beyond_BT = token_BT >= end_B[:, None]
        token_BT[beyond_BT] = 0
        ids_BT = self.split.tokens[token_BT].astype(np.int64)
        ids_BT[beyond_BT] = self.pad_token_id
        labels_BT = np.where(beyond_BT | empty_B[:, None], IGNORE_INDEX, ids_BT)
        batch = {"input_ids": ids_BT, "labels": labels_BT}
        if self.separate_documents:
            batch["position_ids"] = self._positions(begin_B)
            labels_BT[batch["position_ids"] == 0] = IGNORE_INDEX
        return {name: torch.from_numpy(value_BT) for name, value_BT in batch.items()}

    def _tokens_of(self, block_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First token of each block, and the token at which its corpus ends."""
        corpus_B = np.searchsorted(self._last_block_C, block_B, side="right")
        # Counted from the end of the corpus before, which is 0 for the first one.
        first_block_B = np.append(0, self._last_block_C)[corpus_B]
        first_token_B = np.append(0, self._last_token_C)[corpus_B]
        begin_B = first_token_B + (block_B - first_block_B) * self.block_size
        return begin_B, self._last_token_C[corpus_B]

    def _positions(self, begin_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Position of every token in the part of its document that is in the block."""
        offsets = self.split.offsets
        start_BT = np.zeros((len(begin_B), self.block_size + 1), dtype=np.int64)
        for start_T, begin in zip(start_BT, begin_B, strict=True):
            low, high = np.searchsorted(offsets, [begin, begin + len(start_T)])
            starts = offsets[low:high] - begin
            start_T[starts] = starts
        return np.arange(self.block_size + 1) - np.maximum.accumulate(start_BT, axis=1)
