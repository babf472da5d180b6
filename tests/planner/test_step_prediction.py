"""Whole steps: what grows with what, and what each part costs by hand."""

from dataclasses import replace
from typing import Any

import pytest

from lightning_align.planner import HardwareSpec, ModelSpec, ParallelSpec
from lightning_align.planner.efficiencies import Efficiencies
from lightning_align.planner.model_spec import count
from lightning_align.planner.step_prediction import PARTS, StepPrediction, predict_step

HARDWARE = HardwareSpec.from_name("8xa100-sxm-80gb")
MODEL = ModelSpec(8, 1024, 16, vocab_size=32000, seq_len=512)


def predicted(
    model: ModelSpec = MODEL, hardware: HardwareSpec = HARDWARE, **given: Any
) -> StepPrediction:
    return predict_step(model, ParallelSpec(**given), hardware, Efficiencies())


SPLITS: list[dict[str, Any]] = [
    {},
    {"devices": 8},
    {"devices": 8, "tensor_parallel": 4},
    {"devices": 8, "pipeline_parallel": 4, "global_batch_size": 16},
    {"devices": 8, "zero_stage": 3},
    {"devices": 2, "zero_stage": 3, "offload_param": "nvme", "offload_optimizer": "nvme"},
]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "more",
    [
        {"num_layers": 16},
        {"hidden_size": 2048},
        {"seq_len": 1024},
        {"vocab_size": 64000},
        {"ffn_hidden_size": 8192},
    ],
)
def test_more_of_a_model_takes_longer(split: dict[str, Any], more: dict[str, int]) -> None:
    plain, large = predicted(**split), predicted(replace(MODEL, **more), **split)
    assert large.seconds > plain.seconds
    assert sum(large.breakdown.values()) == pytest.approx(large.seconds)
    assert min(large.breakdown.values()) >= 0
    assert tuple(large.breakdown) == PARTS


@pytest.mark.parametrize("split", SPLITS)
def test_a_larger_batch_takes_longer_and_less_for_each_row(split: dict[str, Any]) -> None:
    rows = ParallelSpec(**split).batch_size
    times = [
        predicted(**{**split, "global_batch_size": rows * times}).seconds for times in (1, 2, 4)
    ]
    assert times[0] < times[1] < times[2]
    assert times[2] / 4 <= times[1] / 2 <= times[0]


def test_recomputation_costs_about_a_third() -> None:
    big = replace(MODEL, hidden_size=8192)
    plain, again = (
        predicted(big, micro_batch_size=8, activation_checkpointing=kind).seconds
        for kind in ("none", "full")
    )
    assert 1.2 < again / plain < 1.36


def test_better_hardware_is_not_slower() -> None:
    spec = {"devices": 8, "tensor_parallel": 2}
    plain = predicted(**spec).seconds
    for figure in ("peak_flops", "mem_bandwidth", "intra_bandwidth"):
        better = replace(HARDWARE, **{figure: 2 * getattr(HARDWARE, figure)})
        assert predicted(hardware=better, **spec).seconds < plain


def test_replicas_on_other_nodes_cost_messages() -> None:
    near = predicted(devices=8, overlap_grad_reduce=False)
    far = predicted(devices=16, overlap_grad_reduce=False)
    assert far.breakdown["replicas"] > near.breakdown["replicas"] > 0
    hidden = predicted(devices=16).breakdown["replicas"]
    assert 0 < hidden < far.breakdown["replicas"]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_processor_sends_with_the_cores_that_compute(stage: int) -> None:
    def messages(hardware: HardwareSpec) -> float:
        found = predicted(hardware=hardware, devices=8, zero_stage=stage).breakdown
        return found["replicas"] + found["transfers"]

    sent = messages(replace(HARDWARE, is_asynchronous=False))
    fast = replace(HARDWARE, is_asynchronous=False, intra_bandwidth=HARDWARE.intra_bandwidth * 1e6)
    assert sent > 1.5 * messages(HARDWARE)
    assert sent > 10 * messages(fast)


@pytest.mark.parametrize("devices", [8, 64, 512, 2048])
def test_256_nodes_are_sane(devices: int) -> None:
    """As many rows a device take about as long on any number of nodes, and never less."""
    big = replace(MODEL, hidden_size=4096, num_layers=32)
    one = predicted(big, devices=1, micro_batch_size=2).seconds
    many = predicted(big, devices=devices, micro_batch_size=2, zero_stage=1).seconds
    assert 0.8 * one < many < 2 * one


@pytest.mark.parametrize(("precision", "a_parameter"), [("32-true", 28), ("bf16-true", 30)])
def test_drives_move_what_the_strategy_moves(precision: str, a_parameter: int) -> None:
    """Bytes of a parameter of a block and step, with AdamW (docs of zero_infinity)."""
    deep = replace(MODEL, num_layers=100)
    found = predicted(
        deep,
        zero_stage=3,
        offload_param="nvme",
        offload_optimizer="nvme",
        precision=precision,
    )
    blocks = deep.num_layers * count(deep.block_shapes)
    assert found.nvme.read + found.nvme.written == pytest.approx(a_parameter * blocks, rel=0.02)
    assert found.breakdown["transfers"] > 0
    rates = ("nvme_read_bandwidth", "nvme_write_bandwidth", "host_bandwidth")
    away = replace(HARDWARE, **dict.fromkeys(rates, 1e15))
    fast = predicted(deep, away, zero_stage=3, offload_param="nvme", offload_optimizer="nvme")
    assert fast.breakdown["transfers"] == 0


def test_many_batches_move_what_each_of_them_moves() -> None:
    spec = {"zero_stage": 3, "offload_param": "nvme", "offload_optimizer": "nvme"}
    four, five, nine = (predicted(global_batch_size=many, **spec).nvme.read for many in (4, 5, 9))
    assert nine - four == pytest.approx(5 * (five - four))


def test_products_of_optimizers_take_time() -> None:
    plain, muon, galore = (
        predicted(optimizer=name).breakdown["update"] for name in ("adamw", "muon", "galore_adamw")
    )
    assert muon > 0
    assert galore != plain
    lisa = predicted(lisa_layers=1).breakdown["update"]
    assert lisa < plain
