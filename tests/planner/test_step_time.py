"""Predicted times: by hand for single operations, added up for modules."""

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_align.planner import MachineBalance, StepReport, analyze_step, predict_step_time
from lightning_align.planner.step_time import StepTime, time_of
from tests.helpers.step_models import gpt, loss_of
from tests.planner.test_balance import record

SLOW_CALLS = {None: 1.0}


def machine(**more: Any) -> MachineBalance:
    """100 FLOPs and 10 bytes a second: the ridge is at 10 FLOPs a byte."""
    return MachineBalance("by hand", peak_flops=100.0, mem_bandwidth=10.0, **more)


@pytest.mark.parametrize(
    ("flops", "moved", "seconds", "bound"),
    [
        (1000, 10, 10 + 1, "compute"),
        (1000, 200, 20 + 1, "memory"),
        (1000, 100, 10 + 1, "compute"),  # at the ridge
        (0, 200, 20 + 1, "memory"),
        (10, 1, 0.1 + 1, "overhead"),
    ],
)
def test_an_operation_is_bound_by_what_takes_longest(
    flops: int, moved: int, seconds: float, bound: str
) -> None:
    found = time_of(record(flops=flops, bytes=moved), machine(overheads=SLOW_CALLS))
    assert found.seconds == pytest.approx(seconds)
    assert found.bound == bound


def test_memory_that_is_never_kept_is_touched_for_the_first_time() -> None:
    """An allocation of 32 MiB, at 8 MiB a second, beside 20 s for its bytes; less is kept."""
    large = record(bytes=200, made=(32 << 20, (32 << 20) - 1))
    hardware = machine(overheads=SLOW_CALLS, fresh_bandwidth=float(8 << 20))
    found = time_of(large, hardware)
    assert (found.seconds, found.bound) == (20 + 4 + 1, "memory")
    assert time_of(large, machine(overheads=SLOW_CALLS)).seconds == 21


def test_storages_that_an_operation_makes_are_known() -> None:
    model = nn.Linear(4, 4)
    x = torch.ones(3, 4)

    def step() -> Any:
        return model(x).mul_(2).t().exp().sum()

    forward = [r for r in analyze_step(model, step).trace.records if r.phase == "forward"]
    made = {record.name: record.made for record in forward[:4]}
    assert made == {"aten.addmm": (48,), "aten.mul_": (), "aten.exp": (48,), "aten.sum": (4,)}


def test_a_device_that_does_not_wait_takes_the_longer_of_both() -> None:
    hardware = machine(overheads=SLOW_CALLS, is_asynchronous=True)
    assert time_of(record(flops=1000, bytes=10), hardware).seconds == 10
    assert time_of(record(flops=10, bytes=1), hardware).seconds == 1


def test_without_the_overhead_a_small_step_would_take_next_to_nothing() -> None:
    """125 operations of a decoder that fits the hand: on a GPU their launches are all there is."""
    model = gpt()
    report = analyze_step(model, loss_of(model))
    spec = MachineBalance.from_spec("h100-sxm", "float32")
    times = StepTime(report, spec)
    launches = len(report.trace.records) * spec.overhead("forward")
    assert times.bound == "overhead"
    assert 0.999 * launches <= times.seconds < 1.1 * launches
    free = MachineBalance("free", spec.peak_flops, spec.mem_bandwidth, is_asynchronous=True)
    assert StepTime(report, free).seconds < 0.1 * launches


def test_views_cost_their_calls_where_nothing_runs_beside_them() -> None:
    model = nn.Linear(2, 2, bias=False)
    report = analyze_step(model, lambda: model(torch.ones(2, 2)).t().sum())
    made = sum(report.trace.views.values())
    assert made > 3
    times = StepTime(report, machine(overheads=SLOW_CALLS))
    assert times.ops["views"].seconds == made
    assert times.ops["views"].bound == "overhead"
    ahead = StepTime(report, machine(overheads=SLOW_CALLS, is_asynchronous=True))
    assert "views" not in ahead.ops


class Recomputed(nn.Module):
    """Two linear layers and what is between them, again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh())

    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_checkpoints_cost_python_of_each_region_and_of_what_is_not_saved() -> None:
    """Two regions of as many tensors, each under its module."""
    model = nn.Sequential(Recomputed(), Recomputed())
    x = torch.ones(3, 2, requires_grad=True)
    report = analyze_step(model, lambda: model(x).sum())
    regions = report.trace.checkpoints
    assert [each.saved > 2 for each in regions] == [True] * 2
    hardware = machine(checkpoint_s=100.0, checkpoint_saved_s=10.0)
    one = 100 + 10 * regions[0].saved
    times, free = StepTime(report, hardware), StepTime(report, machine())
    assert times.ops["checkpoint"].seconds == 2 * one
    assert times.seconds == pytest.approx(free.seconds + 2 * one)
    for place in ("0", "0.inner", "1", "1.inner"):
        assert times.modules[place].seconds == pytest.approx(free.modules[place].seconds + one)
    assert times.phases["recompute"].by_bound["overhead"] == pytest.approx(2 * one)
    ahead = machine(checkpoint_s=100.0, checkpoint_saved_s=10.0, is_asynchronous=True)
    assert "checkpoint" not in StepTime(report, ahead).ops


@pytest.fixture(scope="module")
def report() -> StepReport:
    model = gpt()
    return analyze_step(model, loss_of(model), optimizer=torch.optim.AdamW(model.parameters()))


def test_times_add_up(report: StepReport) -> None:
    times = StepTime(report, machine())
    assert times.seconds == pytest.approx(sum(cost.seconds for cost in times.phases.values()))
    assert times.seconds == pytest.approx(sum(cost.seconds for cost in times.ops.values()))
    assert times.modules[""].seconds == pytest.approx(times.seconds)
    assert list(times.modules) == list(report.module_names)
    assert list(times.blocks) == ["layers.0", "layers.1", "layers.2"]
    blocks = sum(cost.seconds for cost in times.blocks.values())
    assert blocks == pytest.approx(times.modules["layers"].seconds)
    assert sum(times.total.by_bound.values()) == pytest.approx(times.seconds)


def test_a_better_machine_is_not_slower(report: StepReport) -> None:
    plain = StepTime(report, machine()).seconds
    assert StepTime(report, MachineBalance("m", 200.0, 10.0)).seconds < plain
    assert StepTime(report, MachineBalance("m", 100.0, 20.0)).seconds < plain
    assert StepTime(report, MachineBalance("m", 200.0, 20.0)).seconds == pytest.approx(plain / 2)


def test_the_interval_is_that_of_what_was_measured(report: StepReport) -> None:
    """A peak between half and twice, a bandwidth that is certain."""
    hardware = machine(intervals={"peak_flops": (50.0, 200.0), "mem_bandwidth": (10.0, 10.0)})
    times = StepTime(report, hardware)
    compute, memory = (times.total.by_bound[bound] for bound in ("compute", "memory"))
    assert times.interval == pytest.approx((compute / 2 + memory, 2 * compute + memory))
    assert StepTime(report, machine()).interval == pytest.approx((times.seconds, times.seconds))


def test_a_step_is_run_once() -> None:
    model, calls = nn.Linear(2, 2), []

    def step() -> Any:
        calls.append(1)
        return model(torch.ones(2)).sum()

    times = predict_step_time(model, step, machine())
    assert len(calls) == 1
    assert times.report.total_flops == 2 * 4 + 2 * 4  # forward, and the weight's gradient


def test_on_meta_it_takes_as_long() -> None:
    with torch.device("meta"):
        meta = gpt()
    model = gpt()
    ours = predict_step_time(meta, loss_of(meta), machine()).seconds
    assert ours == predict_step_time(model, loss_of(model), machine()).seconds


def test_times_are_plain_data_and_a_table(report: StepReport) -> None:
    times = StepTime(report, machine())
    found = json.loads(json.dumps(times.to_dict()))
    assert found["seconds"] == times.seconds
    assert found["modules"]["layers.0"]["bound"] in ("compute", "memory")
    assert times.to_table(top_k=2).splitlines()[2].startswith("| (all) |")


def test_hardware_must_be_a_balance() -> None:
    with pytest.raises(ValueError, match=r"hw='h100'.*MachineBalance\.from_spec\('h100'\)"):
        predict_step_time(nn.Linear(1, 1), lambda: None, "h100")
