"""Configurations of DeepSpeed: what is kept, and what is named."""

import pytest

from lightning_align.data.data_efficiency import read_data_efficiency

METRIC = {
    "index_to_sample_path": "index/rarity_index_to_sample_percentile_merged",
    "index_to_metric_path": "index/rarity_index_to_metric",
    "difficulty_type": "percentile",
    "clustering_type": "schedule_based",
    "min_difficulty": 1,
    "max_difficulty": 100,
    "schedule_type": "fixed_root",
    "schedule_config": {"total_curriculum_step": 110, "difficulty_step": 1, "root_degree": 2},
}
SEQUENCE_LENGTH = {
    "difficulty_type": "value",
    "clustering_type": "single_cluster",
    "min_difficulty": 80,
    "max_difficulty": 2048,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 110, "difficulty_step": 8},
}


def a_config(**changes):
    learning = {
        "enabled": True,
        "data_cluster_path": "clusters",
        "curriculum_metrics": {"vocabularyrarity": METRIC, "seqlen": SEQUENCE_LENGTH},
        **changes,
    }
    return {
        "train_batch_size": 64,
        "data_efficiency": {
            "enabled": True,
            "seed": 7,
            "data_routing": {"enabled": True, "random_ltd": {"enabled": True}},
            "data_sampling": {
                "enabled": True,
                "num_epochs": 1,
                "num_workers": 4,
                "curriculum_learning": learning,
                "dynamic_batching": {"enabled": False, "max_tokens": 10},
            },
        },
    }


def test_reads_a_whole_configuration_and_names_what_is_not_kept():
    read = read_data_efficiency(a_config())
    assert read.seed == 7
    rarity, length = read.metrics["vocabularyrarity"], read.metrics["seqlen"]
    assert rarity.orders_samples
    assert rarity.difficulty_type == "percentile"
    assert rarity.index_to_sample_path == METRIC["index_to_sample_path"]
    assert rarity.index_to_metric_path == METRIC["index_to_metric_path"]
    assert rarity.index_prefix == "index/rarity"
    assert length.index_prefix is None
    assert rarity.scheduler.get_difficulty(110) == 100
    assert not length.orders_samples
    assert length.scheduler.get_difficulty(0) == 80
    assert read.not_kept.keys() == {
        "data_routing",
        "data_sampling.num_epochs",
        "data_sampling.num_workers",
        "data_sampling.curriculum_learning.data_cluster_path",
    }
    assert "max_epochs" in read.not_kept["data_sampling.num_epochs"]


def test_reads_the_block_alone_and_names_misspelt_keys_and_custom_schedules():
    metric = {**METRIC, "schedule_type": "custom", "schedule_config": {}, "difficulty": "value"}
    config = a_config(curriculum_metrics={"mine": metric})["data_efficiency"]
    del config["seed"]
    read = read_data_efficiency(config)
    assert read.seed == 1234
    here = "data_sampling.curriculum_learning.curriculum_metrics.mine."
    assert read.not_kept[f"{here}difficulty"] == "no such key is known"
    assert "pass the function" in read.not_kept[f"{here}schedule_type"]


def test_reads_the_older_curriculum_of_sequence_length():
    pace = {key: SEQUENCE_LENGTH[key] for key in SEQUENCE_LENGTH if "type" not in key}
    legacy = {"enabled": True, "curriculum_type": "seqlen", "schedule_type": "fixed_linear", **pace}
    read = read_data_efficiency({"curriculum_learning": legacy})
    assert not read.metrics["seqlen"].orders_samples
    assert read.metrics["seqlen"].scheduler.get_difficulty(10**4) == 2048
    with pytest.raises(ValueError, match=r"curriculum_type='loss'.: must be one of 'seqlen'"):
        read_data_efficiency({"curriculum_learning": {**legacy, "curriculum_type": "loss"}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"data_efficiency=\{\}\): must be a block with enabled: true"),
        ({"data_efficiency": {"enabled": False}}, "must be a block with enabled: true"),
        ({"enabled": True}, r"data_sampling=\{\}\): must be a block with enabled: true"),
        (a_config(enabled=False), r"curriculum_learning=.*: must be a block with enabled: true"),
        (a_config(curriculum_metrics={}), r"curriculum_metrics=\{\}\): must name at least one"),
        (a_config(curriculum_metrics={"a": 3}), r"a=3\): must be a mapping"),
        (
            a_config(curriculum_metrics={"a": {**METRIC, "index_to_sample_path": None}}),
            r"a.index_to_sample_path=None\): must name the index",
        ),
        (
            a_config(curriculum_metrics={"a": {**METRIC, "difficulty_type": "rank"}}),
            r"a.difficulty_type='rank'\): must be one of 'value', 'percentile'",
        ),
        (
            a_config(curriculum_metrics={"a": {**METRIC, "schedule_type": "no"}}),
            "schedule_type='no'",
        ),
    ],
)
def test_refuses(config, message):
    with pytest.raises(ValueError, match=message):
        read_data_efficiency(config)
