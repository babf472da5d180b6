"""In which rows the pairs of a module's batches run, and batches that may be cut between pairs.

Shapes: P pairs, B = 2 P sequences, [chosen; rejected], of T tokens; R rows of L places.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_align._errors import argument_error
from lightning_align.layers import ModelLayers
from lightning_align.losses import (
    PairAttention,
    PairLayout,
    check_pair_attention,
    padding_arguments,
    pair_layout,
)

KEYS = ("input_ids", "attention_mask", "completion_mask")
Batch = dict[str, Any]


class PairRows:
    """How a module lays out its batches.

    Args:
        where: Class the user called.
        prefix_sharing: Whether a pair is one row, "auto" for where that costs less.
        packing: Whether a row may hold several pairs.
    """

    def __init__(self, where: str, prefix_sharing: bool | str, packing: bool) -> None:
        self.where = where
        self.prefix_sharing, self.packing = prefix_sharing, packing
        # What policy and reference must be told about rows of pairs; nothing if those are separate.
        self._attention: list[PairAttention] = []

    def set_up(self, policy: ModelLayers, reference: ModelLayers | None) -> None:
        """Ask the models that will run whether they can share.

        Raises:
            ValueError: If one cannot, though it must.
        """
        self._attention = []
        if self.prefix_sharing is False:
            return
        models = [policy] if reference is None else [policy, reference]
        try:
            self._attention = [check_pair_attention(layers) for layers in models]
        except ValueError as reason:
            if self.prefix_sharing is True:
                rule = f"this model cannot do it. {reason}"
                way_out = "Set prefix_sharing='auto' or False"
                raise argument_error(self.where, "prefix_sharing", True, rule, way_out) from reason
            rank_zero_warn(f"{self.where} computes the prompt of a pair twice. {reason}")

    def of(self, batch: Batch, hidden_size: int) -> PairLayout | None:
        """Rows of a batch of pairs; None for separate ones."""
        if not self._attention:
            return None
        return pair_layout(
            *(batch[key] for key in KEYS),
            packing=self.packing,
            hidden_size=hidden_size,
            only_if_cheaper=self.prefix_sharing == "auto",
            pairs_alone=all(attention.pairs_alone for attention in self._attention),
        )

    def inputs(self, batch: Batch, layers: ModelLayers, *, of_reference: bool = False) -> Batch:
        """What a model is called with for a batch, in the rows of its ``layout`` if it has one."""
        layout = batch.get("layout")
        if layout is None:
            return {"input_ids": batch["input_ids"], **padding_arguments(batch["attention_mask"])}
        return self._attention[of_reference].arguments(layout, layers.head.weight.dtype)


def by_pair(batch: Batch) -> Batch:
    """The batch so that it may be cut between any two of its pairs: all tensors are (P, ...).

    Args:
        batch: Of pairs, with a ``layout`` of which each row is a pair, or None.
    """
    num_pairs = len(batch["input_ids"]) // 2
    cut: Batch = {
        key: _pairs_first(value) if isinstance(value, Tensor) and key in KEYS else value
        for key, value in batch.items()
    }
    if (layout := batch.get("layout")) is not None:
        assert len(layout.input_ids_RL) == num_pairs
        width = layout.input_ids_RL.shape[1]
        cut["layout"] = layout._replace(index_BT=_pairs_first(layout.index_BT) % width)
    return cut


def by_sequence(batch: Batch) -> Batch:
    """The way back from ``by_pair``, of all pairs or some that follow each other."""
    whole: Batch = {
        key: _sequences_first(value) if key in KEYS else value for key, value in batch.items()
    }
    if (layout := batch.get("layout")) is not None:
        rows, width = layout.input_ids_RL.shape
        first_P = width * layout.index_BT.new_tensor(range(rows))
        index_BT = _sequences_first(layout.index_BT + first_P[:, None, None])
        whole["layout"] = layout._replace(index_BT=index_BT)
    return whole


def _pairs_first(rows_BT: Tensor) -> Tensor:
    return torch.stack(rows_BT.chunk(2), dim=1)  # (P, 2, T)


def _sequences_first(rows_P2T: Tensor) -> Tensor:
    return rows_P2T.transpose(0, 1).flatten(0, 1)
