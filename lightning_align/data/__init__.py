"""Text and preference pairs on disk, in memory and in batches (knows torch, never Lightning)."""

from lightning_align.data.packing import PackedDataset
from lightning_align.data.preference import Pair, PreferenceDataset, collate_pairs, read_pairs
from lightning_align.data.sampler import PositionSampler

__all__ = [
    "PackedDataset",
    "Pair",
    "PositionSampler",
    "PreferenceDataset",
    "collate_pairs",
    "read_pairs",
]
