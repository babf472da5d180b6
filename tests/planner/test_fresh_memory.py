"""Fresh memory by hand: what operations make, gradients, and who is spared."""

from dataclasses import replace
from typing import Any

import pytest

from lightning_align._compat.glibc_memory import LARGE
from lightning_align.planner import HardwareSpec, ModelSpec, ParallelSpec
from lightning_align.planner.block_analysis import BlockAnalysis
from lightning_align.planner.efficiencies import Efficiencies
from lightning_align.planner.fresh_memory import Made, fresh_seconds
from lightning_align.planner.step_prediction import predict_step

# A byte a second.
PROCESSOR = HardwareSpec.from_name("xeon-8480", nvme_read_bandwidth=1e15, nvme_write_bandwidth=1e15)
PROCESSOR = replace(PROCESSOR, host_bandwidth=1e15, fresh_bandwidth=1.0)
BLOCK = BlockAnalysis(
    block_shapes=(("matrices", (256, 256)), ("norms_biases", (256,))),  # 256 KiB, and 1
    first_shapes=(),
    last_shapes=(),
    made=(
        Made("forward", 1024.0, 0.0, 3),  # 256 KiB of 256 tokens
        Made("forward", 512.0, 0.0, 7),
        Made("backward", 512.0, 8.0, 5),  # 256 KiB of 4 rows of 64
    ),
)
MODEL = ModelSpec(2, 256, 4, vocab_size=100, seq_len=64, analysis=BLOCK)
DRIVE = ParallelSpec(
    micro_batch_size=4,
    zero_stage=3,
    offload_param="nvme",
    offload_optimizer="nvme",
    precision="32-true",
)


@pytest.mark.parametrize(
    ("change", "ahead", "back"),
    [
        ({}, 6, 10 + 2),  # two blocks: three and five tensors each, and a gradient
        ({"activation_checkpointing": "full"}, 6, 6 + 10 + 2),
        ({"precision": "bf16-mixed"}, 0, 2),  # tensors half as large are kept
        ({"precision": "bf16-mixed", "micro_batch_size": 8}, 6, 10 + 2),
        ({"micro_batch_size": 8}, 2 * 6 + 2 * 7, 2 * 10 + 2),  # the smaller ones are mapped, too
        ({"lisa_layers": 1}, 6, 10 + 1),
        ({"offload_param": "cpu"}, 6, 10 + 2),
        ({"offload_optimizer": "cpu"}, 6, 10 + 2),
    ],
)
def test_tensors_from_256_kib_on_are_touched_for_the_first_time(
    change: dict[str, Any], ahead: int, back: int
) -> None:
    found = fresh_seconds(MODEL, replace(DRIVE, **change), PROCESSOR)
    assert found == (ahead * LARGE, back * LARGE)


def test_logits_are_made_once_in_chunks() -> None:
    model = replace(MODEL, vocab_size=256)
    assert fresh_seconds(model, DRIVE, PROCESSOR)[0] == 7 * LARGE


def test_blocks_that_were_not_analysed_have_gradients_alone() -> None:
    model = replace(MODEL, analysis=replace(BLOCK, made=()))
    assert fresh_seconds(model, DRIVE, PROCESSOR) == (0, 2 * LARGE)


@pytest.mark.parametrize(
    ("parallel", "hardware"),
    [
        (replace(DRIVE, offload_param="cpu", offload_optimizer="cpu"), PROCESSOR),
        (ParallelSpec(), PROCESSOR),
        (DRIVE, replace(PROCESSOR, fresh_bandwidth=None)),
        (DRIVE, replace(PROCESSOR, is_asynchronous=True)),
    ],
)
def test_memory_that_is_kept_costs_nothing(parallel: ParallelSpec, hardware: HardwareSpec) -> None:
    assert fresh_seconds(MODEL, parallel, hardware) == (0, 0)


def test_each_micro_batch_of_a_step_has_it_and_transfers_hide_behind_it() -> None:
    """Eight blocks, of which three are in memory, so that every phase reads."""
    model, spec = replace(MODEL, num_layers=8), replace(DRIVE, global_batch_size=8)

    def added(**drive: float) -> float:
        kept, fresh = (
            replace(PROCESSOR, fresh_bandwidth=rate, **drive) for rate in (None, 1e3 * LARGE)
        )
        return (
            predict_step(model, spec, fresh, Efficiencies()).seconds
            - predict_step(model, spec, kept, Efficiencies()).seconds
        )

    assert added() == pytest.approx(2 * 8 * (3 + 5 + 1) / 1e3, rel=1e-6)
    assert added(nvme_read_bandwidth=1e6, nvme_write_bandwidth=1e6) == pytest.approx(0, abs=1e-9)
