"""Data on disk, in memory and in batches (knows torch, never Lightning)."""

from lightning_align.data.conversation import (
    ConversationDataset,
    collate_conversations,
    read_conversations,
)
from lightning_align.data.mixture import Mixture
from lightning_align.data.packing import PackedDataset
from lightning_align.data.pair_formats import Pair
from lightning_align.data.preference import PreferenceDataset, collate_pairs, read_pairs
from lightning_align.data.sampler import PositionSampler

__all__ = [
    "ConversationDataset",
    "Mixture",
    "PackedDataset",
    "Pair",
    "PositionSampler",
    "PreferenceDataset",
    "collate_conversations",
    "collate_pairs",
    "read_conversations",
    "read_pairs",
]
