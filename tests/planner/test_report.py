"""How a report adds up, and how it is shown."""

import json

import pytest
import torch
from torch import nn

from lightning_align.planner import analyze_step
from lightning_align.planner.report import Cost, StepReport, enclosing
from tests.helpers.step_models import gpt, loss_of


@pytest.fixture(scope="module")
def report() -> StepReport:
    model = gpt()
    return analyze_step(model, loss_of(model), optimizer=torch.optim.AdamW(model.parameters()))


def test_phases_and_operations_add_up_to_the_step(report: StepReport) -> None:
    for costs in (report.phases, report.ops):
        assert sum(cost.flops for cost in costs.values()) == report.total_flops
        assert sum(cost.bytes for cost in costs.values()) == report.bytes
        assert sum(cost.pointwise_flops for cost in costs.values()) == report.pointwise_flops
        assert sum(cost.calls for cost in costs.values()) == len(report.trace.records)
    assert list(report.ops.values()) == sorted(report.ops.values(), key=lambda c: -c.bytes)


def test_a_module_contains_what_runs_inside_of_it(report: StepReport) -> None:
    assert list(report.modules) == [name for name, _ in gpt().named_modules()]
    assert report.modules[""].flops == report.total_flops
    block = report.modules["layers.1"]
    parts = [cost for name, cost in report.modules.items() if name.startswith("layers.1.")]
    assert block.bytes > max(cost.bytes for cost in parts)
    assert block.least_bytes < block.bytes
    children = ["norm_1", "norm_2", "qkv", "out", "mlp"]
    inside = sum(report.modules[f"layers.1.{name}"].flops for name in children)
    attention = block.flops - inside
    assert attention == 7 * 2 * 2 * 48 * 48 * 64
    assert list(report.blocks) == ["layers.0", "layers.1", "layers.2"]


def test_saved_bytes_of_a_layer() -> None:
    """A linear layer saves its input; so does tanh its result, which the next layer saves again."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    x = torch.ones(4, 8)
    report = analyze_step(model, lambda: model(x).sum())
    saved = {name: cost.saved_bytes for name, cost in report.modules.items()}
    assert saved == {"": x.nbytes, "0": 0, "1": x.nbytes, "2": x.nbytes}  # the batch was there
    assert report.saved_bytes == x.nbytes


def test_a_model_without_blocks_has_none() -> None:
    model = nn.Linear(2, 2)
    assert analyze_step(model, lambda: model(torch.ones(2)).sum()).blocks == {}


def test_intensity_counts_all_flops() -> None:
    assert Cost(flops=6, pointwise_flops=2, bytes=4).intensity == 2
    assert Cost().intensity == 0


def test_a_report_is_plain_data(report: StepReport) -> None:
    found = json.loads(json.dumps(report.to_dict()))
    assert found["total_flops"] == report.total_flops
    assert found["modules"]["layers.0"]["intensity"] == report.blocks["layers.0"].intensity


def test_the_table_has_the_largest_modules(report: StepReport) -> None:
    lines = report.to_table(top_k=3).splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("| (all) |")
    assert "layers" in lines[3]


def test_modules_around_an_operation() -> None:
    assert enclosing(("", "a.b", "rotary")) == {"", "a", "a.b", "rotary"}
