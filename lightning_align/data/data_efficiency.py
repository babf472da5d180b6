"""Reads the configuration of DeepSpeed's data-efficiency library, and names what it cannot keep.

DeepSpeed describes a curriculum in the block ``data_efficiency`` of its configuration (and, up to
0.18, one of sequence length in the block ``curriculum_learning``). What is about pacing and index
files carries over as it is. The rest is somebody else's here, or has no counterpart: nothing is
dropped without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_align._errors import argument_error, check_choice
from lightning_align.data.eligibility import DIFFICULTY_TYPES
from lightning_align.data.pacing import CurriculumScheduler

WHERE = "read_data_efficiency"
DEFAULT_SEED = 1234  # DeepSpeed's


@dataclass(frozen=True)
class MetricCurriculum:
    """One measure of difficulty in DeepSpeed's configuration.

    Args:
        scheduler: Its pacing. A ``"custom"`` one has no function yet: code is not in a
            configuration (``set_custom_get_difficulty``).
        difficulty_type: ``"value"`` or ``"percentile"``.
        orders_samples: Whether it chooses samples. Else, for ``"single_cluster"`` and the
            sequence length of the older block, it says how long every sample is cut.
        index_to_sample_path: Prefix of DeepSpeed's index files: sample numbers by difficulty.
        index_to_metric_path: Likewise: the difficulties.
    """

    scheduler: CurriculumScheduler
    difficulty_type: str
    orders_samples: bool
    index_to_sample_path: str | None = None
    index_to_metric_path: str | None = None

    @property
    def index_prefix(self) -> str | None:
        """What the names of its index files begin with: ``open_index`` takes it."""
        path = self.index_to_sample_path
        return None if path is None else re.sub("_index_to_sample(_percentile_merged)?$", "", path)


@dataclass(frozen=True)
class DataEfficiency:
    """What a configuration of DeepSpeed says about a curriculum.

    Args:
        seed: Seed of the order.
        metrics: Measures of difficulty by name.
        not_kept: What has no counterpart: the path of a key, and where to say it instead.
    """

    seed: int
    metrics: dict[str, MetricCurriculum]
    not_kept: dict[str, str]


def read_data_efficiency(config: Mapping[str, Any]) -> DataEfficiency:
    """Read the curriculum of a DeepSpeed configuration.

    Args:
        config: A whole configuration, or its block ``data_efficiency`` alone.

    Raises:
        ValueError: If it has no curriculum that is enabled, or one that is not complete.
    """
    legacy = config.get("curriculum_learning")
    if "data_efficiency" not in config and legacy is not None:
        return _read_legacy(legacy)
    block = config.get("data_efficiency", config)
    sampling = _enabled(block, "data_efficiency").get("data_sampling", {})
    learning = _enabled(sampling, "data_sampling").get("curriculum_learning", {})
    named = _enabled(learning, "curriculum_learning").get("curriculum_metrics")
    if not isinstance(named, Mapping) or not named:
        rule = "must name at least one metric"
        raise argument_error(WHERE, "curriculum_metrics", named, rule)
    metrics = {name: _metric(name, metric) for name, metric in named.items()}
    return DataEfficiency(block.get("seed", DEFAULT_SEED), metrics, dict(_not_kept(block)))


def _enabled(block: Any, name: str) -> Mapping[str, Any]:
    """A block that is there and enabled.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(block, Mapping) or not block.get("enabled", False):
        rule = "must be a block with enabled: true, or there is no curriculum in it"
        raise argument_error(WHERE, name, block, rule)
    return block


def _metric(name: str, metric: Any) -> MetricCurriculum:
    """One entry of ``curriculum_metrics``.

    Raises:
        ValueError: If it is not complete.
    """
    if not isinstance(metric, Mapping):
        raise argument_error(WHERE, name, metric, "must be a mapping")
    single = metric.get("clustering_type") == "single_cluster"
    paths = [metric.get(key) for key in ("index_to_sample_path", "index_to_metric_path")]
    kind = metric.get("difficulty_type", "value")
    check_choice(WHERE, f"{name}.difficulty_type", kind, DIFFICULTY_TYPES)
    if not single and paths[0] is None:
        rule = "must name the index by which samples are chosen"
        raise argument_error(WHERE, f"{name}.index_to_sample_path", None, rule)
    return MetricCurriculum(CurriculumScheduler(metric), kind, not single, *paths)


def _read_legacy(block: Any) -> DataEfficiency:
    """The block of the older curriculum, which only knows the sequence length.

    Raises:
        ValueError: If it is not enabled, or of another type.
    """
    kind = _enabled(block, "curriculum_learning").get("curriculum_type", "seqlen")
    check_choice(WHERE, "curriculum_type", kind, ["seqlen"])
    length = MetricCurriculum(CurriculumScheduler(block), "value", orders_samples=False)
    return DataEfficiency(DEFAULT_SEED, {"seqlen": length}, {})


def _not_kept(block: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from _unknown(block, "", {"enabled", "seed", "data_sampling"})
    sampling = block["data_sampling"]
    yield from _unknown(sampling, "data_sampling.", {"enabled", "curriculum_learning"})
    learning, path = sampling["curriculum_learning"], "data_sampling.curriculum_learning."
    yield from _unknown(learning, path, {"enabled", "curriculum_metrics"})
    for name, metric in learning["curriculum_metrics"].items():
        here = f"{path}curriculum_metrics.{name}."
        yield from _unknown(metric, here, _METRIC_KEYS)
        if metric["schedule_type"] == "custom":
            yield f"{here}schedule_type", "code is in no configuration: pass the function"


def _unknown(block: Mapping[str, Any], path: str, known: set[str]) -> Iterator[tuple[str, str]]:
    for key, value in block.items():
        off = isinstance(value, Mapping) and value.get("enabled") is False
        if key not in known and not off:
            yield path + key, _INSTEAD.get(key, "no such key is known")


_METRIC_KEYS = {
    "index_to_sample_path",
    "index_to_metric_path",
    "difficulty_type",
    "clustering_type",
    "min_difficulty",
    "max_difficulty",
    "schedule_type",
    "schedule_config",
}
_INSTEAD = {
    "num_epochs": "the Trainer's max_epochs",
    "num_workers": "an argument of the datamodule or the DataLoader",
    "pin_memory": "an argument of the datamodule or the DataLoader",
    "data_cluster_path": "nothing is written while training: orders are computed",
    "dynamic_batching": "packing fills batches to a number of tokens",
    "data_routing": "random layer-token drop is not part of this",
}
