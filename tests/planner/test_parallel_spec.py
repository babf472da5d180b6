"""Splits that fit, and all that do not."""

from typing import Any

import pytest

from lightning_align.planner import ModelSpec, ParallelSpec

MODEL = ModelSpec(6, 64, 8, 4, vocab_size=100, seq_len=30)


def test_what_is_left_is_data_parallel() -> None:
    spec = ParallelSpec(devices=16, tensor_parallel=2, pipeline_parallel=2, micro_batch_size=3)
    assert (spec.replicas, spec.batch_size, spec.num_microbatches) == (4, 12, 1)
    assert ParallelSpec(devices=4, global_batch_size=32).num_microbatches == 8


def test_pairs_are_two_rows_less_what_they_share() -> None:
    assert ParallelSpec(objective="dpo", micro_batch_size=4).rows == 8
    shared = ParallelSpec(objective="dpo", micro_batch_size=4, shared_prefix=0.5)
    assert shared.rows == 6
    assert shared.has_reference
    assert not ParallelSpec(objective="dpo", reference="precomputed").has_reference


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"devices": 0}, "devices=0.*at least 1"),
        ({"micro_batch_size": 1.5}, "micro_batch_size=1.5.*whole"),
        ({"devices": 8, "tensor_parallel": 3}, "devices=8.*multiple of tensor_parallel"),
        (
            {"devices": 8, "tensor_parallel": 2, "data_parallel": 8},
            r"data_parallel=8\).*8 \* 1 \* 2 must be devices.*which is 4",
        ),
        (
            {"devices": 4, "micro_batch_size": 2, "global_batch_size": 12},
            r"global_batch_size=12\): must be a multiple of .* 2 \* 4. Use 8",
        ),
        ({"optimizer": "lion"}, "optimizer='lion'.*'adamw'.*'muon'"),
        ({"schedule": "1f1b"}, "schedule='1f1b'.*'1F1B'"),
        ({"precision": "fp8"}, "precision='fp8'.*must be one of"),
        ({"zero_stage": 4}, "zero_stage=4"),
        ({"offload_param": "disk"}, "offload_param='disk'"),
        ({"shared_prefix": 1.0, "objective": "dpo"}, "from 0 to below 1"),
        ({"shared_prefix": "half", "objective": "dpo"}, "from 0 to below 1"),
        ({"shared_prefix": 0.5}, "shared_prefix=0.5.*is of the pairs of 'dpo'"),
        ({"reference": "none"}, "reference='none'.*is of the pairs of 'dpo'"),
        ({"chunked_loss": 1}, "chunked_loss=1.*must be a bool"),
        ({"num_model_chunks": 2}, "counts in a pipeline only"),
        ({"devices": 2, "pipeline_parallel": 2, "num_model_chunks": 2}, "Use Interleaved1F1B"),
        (
            {
                "devices": 4,
                "pipeline_parallel": 4,
                "schedule": "Interleaved1F1B",
                "global_batch_size": 27,
            },
            r"num_microbatches=27\): .*6 rounds of equally many",
        ),
        ({"sequence_parallel": True}, "tensor_parallel, which is 1"),
        ({"rank": 8}, "is GaLore's"),
        ({"offload_param": "nvme"}, "needs zero_stage=3"),
        ({"offload_optimizer": "cpu"}, "zero_stage of at least 1"),
        ({"devices": 2, "pipeline_parallel": 2, "zero_stage": 2}, "Use at most 1"),
        (
            {"devices": 2, "pipeline_parallel": 2, "offload_activations": "cpu"},
            "offload_activations='cpu'.*a pipeline's do not",
        ),
    ],
)
def test_impossible_splits_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ParallelSpec(**given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"devices": 8, "pipeline_parallel": 8}, "8 stages need a layer each.*has 6"),
        ({"devices": 8, "tensor_parallel": 8}, "must divide the model's num_kv_heads=4"),
        (
            {"devices": 4, "tensor_parallel": 4, "sequence_parallel": True},
            "must divide seq_len=30",
        ),
        ({"lisa_layers": 7}, "lisa_layers=7.*has 6 blocks"),
    ],
)
def test_models_that_cannot_be_split_so_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ParallelSpec(**given).check_model(MODEL)


def test_only_what_was_chosen_is_told() -> None:
    assert ParallelSpec(optimizer="muon").told() == {"devices": 1, "optimizer": "muon"}
