"""Which devices a configuration asks for, and what the planner is told of its strategy."""

from typing import Any

import pytest
from jsonargparse import Namespace

import lightning_align
from lightning_align.cli.check_split import class_of, devices_of, split_of

assert lightning_align.PipelineStrategy  # registers names


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)


def asked(**given: Any) -> Namespace:
    usual = {"accelerator": "auto", "devices": "auto", "num_nodes": 1, "strategy": "auto"}
    return Namespace(**{**usual, **given})


@pytest.mark.parametrize(
    ("given", "world", "why"),
    [
        ({}, 1, None),
        ({"devices": 2}, 2, None),
        ({"devices": 8, "accelerator": "cpu"}, 8, None),
        ({"devices": 8}, 8, "there are 2 here"),
        ({"devices": 8, "accelerator": "gpu"}, 8, "there is no GPU here"),
        ({"devices": "2,5,7", "accelerator": "cuda"}, 3, "there is no GPU here"),
        ({"devices": [0, 1], "num_nodes": 4, "accelerator": "cpu"}, 8, "this is one machine of 4"),
        ({"accelerator": "tpu"}, 1, "there is no tpu here"),
    ],
)
def test_devices_that_are_not_here_have_a_stand_in(
    given: dict[str, Any], world: int, why: str | None
) -> None:
    found = devices_of(asked(**given))
    assert (found.world, found.is_stand_in) == (world, why is not None)
    assert [each.rpartition(": ")[2] for each in found.unchecked] == [why] * found.is_stand_in


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("auto", "DDPStrategy"),
        ("ddp", "DDPStrategy"),
        ("fsdp", "FSDPStrategy"),
        ("pipeline_1f1b", "PipelineStrategy"),
        ("zero_infinity_cpu", "ZeROInfinityStrategy"),
        ("PipelineStrategy", "PipelineStrategy"),
        ({"class_path": "lightning_align.ZeROInfinityStrategy"}, "ZeROInfinityStrategy"),
    ],
)
def test_the_class_of_a_strategy_by_any_of_its_names(strategy: Any, name: str) -> None:
    assert class_of(strategy)[0] == name


def test_a_pipeline_cuts_the_batch_that_replicas_would_share() -> None:
    arguments = {"num_microbatches": 4, "num_stages_per_rank": 2, "schedule": "Interleaved1F1B"}
    found = split_of(("PipelineStrategy", arguments), 8, rows=16, accumulate=1)
    assert isinstance(found, dict)
    assert (found["pipeline_parallel"], found["num_model_chunks"]) == (8, 2)
    assert (found["micro_batch_size"], found["global_batch_size"]) == (4, 16)


def test_replicas_and_windows_multiply_the_rows_of_a_step() -> None:
    found = split_of(("DDPStrategy", {}), 8, rows=2, accumulate=3)
    assert isinstance(found, dict)
    assert (found["micro_batch_size"], found["global_batch_size"]) == (2, 48)


def test_zero_infinity_by_where_things_lie() -> None:
    arguments = {"stage": 2, "offload_params_device": "none", "offload_optimizer_device": "cpu"}
    found = split_of(("ZeROInfinityStrategy", arguments), 1, rows=1, accumulate=1)
    assert isinstance(found, dict)
    assert (found["zero_stage"], found["offload_param"]) == (2, "none")
    assert found["offload_optimizer"] == "cpu"


def test_a_strategy_that_the_planner_does_not_know_is_named() -> None:
    assert split_of(("XLAStrategy", {}), 8, 1, 1) == "the planner does not know XLAStrategy"
