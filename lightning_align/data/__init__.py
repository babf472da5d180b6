"""Data on disk, in memory and in batches (knows torch, never Lightning)."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.data.batch_sizes import BatchSizes
    from lightning_align.data.bucket_sampler import BucketSampler
    from lightning_align.data.buckets import BucketedDataset
    from lightning_align.data.conversation import (
        ConversationDataset,
        collate_conversations,
        read_conversations,
    )
    from lightning_align.data.curriculum_sampler import CurriculumSampler
    from lightning_align.data.data_efficiency import read_data_efficiency
    from lightning_align.data.difficulty import DifficultyIndex
    from lightning_align.data.difficulty_map import DifficultyAnalyzer
    from lightning_align.data.feedback import SelfPaced
    from lightning_align.data.mixture import Mixture
    from lightning_align.data.mixture_schedule import MixtureSchedule
    from lightning_align.data.pacing import CurriculumScheduler
    from lightning_align.data.packing import PackedDataset
    from lightning_align.data.pair_formats import Pair
    from lightning_align.data.preference import PreferenceDataset, collate_pairs, read_pairs
    from lightning_align.data.reference_cache import ReferenceCache
    from lightning_align.data.sampler import PositionSampler
    from lightning_align.data.skipped import SkippedBatches
    from lightning_align.data.streams import StreamBatches
    from lightning_align.data.unpaired import (
        Labelled,
        UnpairedDataset,
        collate_unpaired,
        read_unpaired,
    )
else:
    _HOMES = {
        "BatchSizes": "batch_sizes",
        "BucketSampler": "bucket_sampler",
        "BucketedDataset": "buckets",
        "ConversationDataset": "conversation",
        "CurriculumSampler": "curriculum_sampler",
        "CurriculumScheduler": "pacing",
        "DifficultyAnalyzer": "difficulty_map",
        "DifficultyIndex": "difficulty",
        "Labelled": "unpaired",
        "Mixture": "mixture",
        "MixtureSchedule": "mixture_schedule",
        "PackedDataset": "packing",
        "Pair": "pair_formats",
        "PositionSampler": "sampler",
        "PreferenceDataset": "preference",
        "ReferenceCache": "reference_cache",
        "SelfPaced": "feedback",
        "SkippedBatches": "skipped",
        "StreamBatches": "streams",
        "UnpairedDataset": "unpaired",
        "collate_conversations": "conversation",
        "collate_pairs": "preference",
        "collate_unpaired": "unpaired",
        "read_conversations": "conversation",
        "read_data_efficiency": "data_efficiency",
        "read_pairs": "preference",
        "read_unpaired": "unpaired",
    }
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = [
    "BatchSizes",
    "BucketSampler",
    "BucketedDataset",
    "ConversationDataset",
    "CurriculumSampler",
    "CurriculumScheduler",
    "DifficultyAnalyzer",
    "DifficultyIndex",
    "Labelled",
    "Mixture",
    "MixtureSchedule",
    "PackedDataset",
    "Pair",
    "PositionSampler",
    "PreferenceDataset",
    "ReferenceCache",
    "SelfPaced",
    "SkippedBatches",
    "StreamBatches",
    "UnpairedDataset",
    "collate_conversations",
    "collate_pairs",
    "collate_unpaired",
    "read_conversations",
    "read_data_efficiency",
    "read_pairs",
    "read_unpaired",
]
