"""What would help, and by how much: steps whose times are known in closed form."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_align.planner import MachineBalance, StepReport, analyze_step
from lightning_align.planner.advice import (
    Setting,
    advise,
    chunked_loss,
    fused_optimizer,
    half_precision,
    larger_micro_batch,
    more_workers,
    nearer_tier,
    no_recomputation,
)
from lightning_align.planner.live_bytes import Storages
from lightning_align.planner.records import Checkpoint, Record, Region, Trace


def op(name: str = "aten.mm", phase: str = "forward", **more: Any) -> Record:
    given = {
        "kind": "product",
        "scope": (),
        "flops": 0,
        "repeated_flops": 0,
        "pointwise_flops": 0,
        "bytes": 0,
        "reads": (),
        "writes": (),
        "dtype": torch.float32,
        "tensors": 1,
    }
    return Record(name=name, phase=phase, **{**given, **more})


def report(*records: Record, saved: int = 0, peak: int = 0) -> StepReport:
    trace = Trace(records=list(records), storages=Storages())
    trace.storages.sizes = [10**9] * 20
    trace.storages.there = {0}
    trace.storages.peak = peak
    trace.saved.peak = saved
    return StepReport(trace, ("",))


def machine(overhead: float = 0.0, **more: Any) -> MachineBalance:
    """A FLOP or a byte a second."""
    return MachineBalance("m", 1.0, 1.0, overheads={None: overhead}, **more)


ADAMW = op("aten.add_", "optimizer", kind="pointwise", bytes=40)


def test_twice_the_rows_halve_calls_and_weights() -> None:
    """Forward: a call of 10 s, 4 s of weights and 6 s of rows: 20 s. Of twice the rows 26 s.

    With two micro-batches of them, and an update of 10 + 40 s: 2 * 20 + 50 = 90, or 26 + 50 = 76.
    """
    forward = op(bytes=10, reads=(Region(0, 0, 4), Region(1, 0, 6)))
    step = report(forward, forward, ADAMW)
    found = larger_micro_batch(step, machine(10), Setting(micro_batches=2))
    # two calls of the window become one, of twice the rows
    assert found is not None
    twice = 2 * (10 + 4 + 12) / 2
    assert found.gain == pytest.approx(90 / (twice + 50) - 1)
    assert "accumulate_grad_batches" in found.text


def test_a_larger_batch_has_fewer_updates() -> None:
    """20 + 50 s for some rows, or 26 + 50 s for twice as many."""
    forward = op(bytes=10, reads=(Region(0, 0, 4), Region(1, 0, 6)))
    found = larger_micro_batch(report(forward, ADAMW), machine(10), Setting())
    assert found is not None
    assert found.gain == pytest.approx(2 * 70 / 76 - 1)
    assert "batch size" in found.text


def test_adding_to_gradients_does_not_grow_with_rows() -> None:
    adds = op("aten.add_", "backward", kind="pointwise", bytes=12, writes=(Region(0, 0, 4),))
    found = larger_micro_batch(report(adds, adds), machine(), Setting(micro_batches=2))
    assert found is not None
    assert found.gain == pytest.approx(1)  # half as many


def test_there_is_no_larger_batch_without_memory() -> None:
    step = report(op(bytes=10), saved=60, peak=100)
    assert larger_micro_batch(step, machine(1), Setting(memory_bytes=159)) is None
    assert larger_micro_batch(step, machine(1), Setting(memory_bytes=160)) is not None


def test_stages_have_the_micro_batches_of_their_schedule() -> None:
    step = report(op(bytes=10))
    assert larger_micro_batch(step, machine(1), Setting(shares_batch=True)) is None


def test_messages_are_as_large_for_twice_the_rows_and_what_they_take_is_measured() -> None:
    """10 s that grow, and a gather, a sum and its copy of 10 s each that do not: 80 s for 50. Where
    10 of 40 measured seconds are messages, the other 30 gain so much, and messages are halved."""
    gathers = [
        op("c10d._allgather_base_", kind="message", bytes=10, phase=phase)
        for phase in ("forward", "backward")
    ]
    step = report(op(flops=10), *gathers, op("fsdp.chunk_cat", "backward", kind="move", bytes=10))
    for micro_batches in (1, 2):
        setting = Setting(micro_batches=micro_batches)
        found = larger_micro_batch(step, machine(), setting)
        assert found is not None
        assert found.gain == pytest.approx(80 / 50 - 1)
        measured = {"forward": 30.0, "communication": 10.0}
        setting = Setting(micro_batches=micro_batches, measured=measured)
        found = larger_micro_batch(step, machine(), setting)
        assert found is not None
        assert found.gain == pytest.approx(40 / (30 * 50 / 80 + 5) - 1)


def test_what_is_not_computed_again_is_saved() -> None:
    """30 s, of which 10 are a repetition that leaves 7 bytes."""
    again = op(phase="recompute", flops=10, writes=(Region(1, 0, 7),))
    step = report(op(flops=20), again, peak=100)
    found = no_recomputation(step, machine(), Setting(memory_bytes=107))
    assert found is not None
    assert found.gain == pytest.approx(0.5)
    assert no_recomputation(step, machine(), Setting(memory_bytes=106)) is None
    assert no_recomputation(report(op(flops=20)), machine(), Setting()) is None


def test_without_recomputation_there_is_no_python_of_checkpoints() -> None:
    """20 s that stay, 10 s that run again, and a region of 4 s with three tensors of 2 s each."""
    step = report(op(flops=20), op(phase="recompute", flops=10))
    step.trace.checkpoints.append(Checkpoint(1, 1, 3))
    hardware = machine(checkpoint_s=4.0, checkpoint_saved_s=2.0)
    found = no_recomputation(step, hardware, Setting())
    assert found is not None
    assert found.gain == pytest.approx(40 / 20 - 1)
    more = larger_micro_batch(step, hardware, Setting())
    assert more is not None
    assert more.gain == pytest.approx(2 * 40 / (2 * 30 + 10) - 1)  # one call for twice the rows


def test_a_fused_update_reads_and_writes_everything_once() -> None:
    """Two calls of 1 s over the same 8 bytes in and out: 34 s; one of 1 + 16 s."""
    first = op("aten.mul_", "optimizer", kind="pointwise", bytes=16)
    first = first._replace(reads=(Region(1, 0, 8),), writes=(Region(1, 0, 8),))
    step = report(op(flops=5), first, first)
    found = fused_optimizer(step, machine(1), Setting(can_fuse=True))
    assert found is not None
    assert found.gain == pytest.approx((6 + 34) / (6 + 17) - 1)
    assert fused_optimizer(step, machine(1), Setting()) is None


def test_norms_before_an_update_stay() -> None:
    """5 s of a product, a norm of 1 + 30 s, and 34 s of the update, in 17 s."""
    norm = op("aten._foreach_norm", "optimizer", kind="reduction", bytes=30)
    first = op("aten.mul_", "optimizer", kind="pointwise", bytes=16)
    first = first._replace(reads=(Region(1, 0, 8),), writes=(Region(1, 0, 8),))
    step = report(op(flops=5), norm, first, first)
    found = fused_optimizer(step, machine(1), Setting(can_fuse=True))
    assert found is not None
    assert found.gain == pytest.approx((6 + 31 + 34) / (6 + 31 + 17) - 1)


def test_loops_are_the_same_for_twice_the_rows() -> None:
    """Of 27 s 20 are predicted: 7 are not of operations, of a processor that was measured."""
    curves = {"product": [(1.0, 1.0), (100.0, 100.0)]}
    step = report(op(flops=10, bytes=10), op(flops=10, bytes=10))
    measured = {"data": 3.0, "forward": 27.0}
    found = larger_micro_batch(step, machine(curves=curves), Setting(measured))
    assert found is not None
    assert found.gain == pytest.approx(2 * 27 / (40 + 7) - 1)
    found = larger_micro_batch(step, machine(curves=curves), Setting(measured, micro_batches=2))
    assert found is not None
    assert found.gain == pytest.approx(27 / (20 + 3.5) - 1)
    busy = larger_micro_batch(step, machine(curves=curves), Setting({"forward": 41.0}))
    assert busy is not None
    assert busy.gain == 0
    assert larger_micro_batch(step, machine(), Setting(measured)).gain == 0  # type: ignore[union-attr]


def test_logits_in_chunks_stay_in_the_caches() -> None:
    """40 s of 50 are of the loss, and the caches are four times as fast."""
    loss = op("aten._log_softmax", kind="norm", bytes=40, reads=(Region(1, 0, 20),))
    step = report(op(flops=10), loss)
    found = chunked_loss(step, machine(cache_bandwidth=4.0), Setting())
    assert found is not None
    assert found.gain == pytest.approx(50 / 20 - 1)
    assert chunked_loss(step, machine(), Setting()) is None
    assert chunked_loss(report(op(flops=10)), machine(cache_bandwidth=4.0), Setting()) is None


def test_logits_in_chunks_are_in_memory_that_is_kept() -> None:
    """A product of 10 s makes logits of 32 MiB, their softmax as many: 16 s each."""
    large, hardware = 32 << 20, {"cache_bandwidth": 4.0, "fresh_bandwidth": float(2 << 20)}
    logits, rest = Region(1, 0, large), Region(2, 0, large)
    head = op(flops=10, writes=(logits,), made=(large,))
    loss = op("aten._log_softmax", kind="norm", bytes=40, reads=(logits,), writes=(rest,))
    loss = loss._replace(made=(large,))
    other = op("aten.mul", kind="pointwise", made=(large,), writes=(Region(3, 0, large),))
    found = chunked_loss(report(head, loss, other), machine(**hardware), Setting())
    assert found is not None
    assert found.gain == pytest.approx((10 + 40 + 3 * 16) / (10 + 10 + 16) - 1)


def test_twice_the_rows_may_be_memory_that_is_not_kept() -> None:
    """10 s for 16 MiB, and of twice as many 20 s and another 16 for 32 MiB."""
    half = op(flops=10, made=(16 << 20,))
    found = larger_micro_batch(report(half), machine(fresh_bandwidth=float(2 << 20)), Setting())
    assert found is not None
    assert found.gain == pytest.approx(2 * 10 / (20 + 16) - 1)


def test_products_in_half_precision() -> None:
    """30 s of products at 4 times the peak, and 10 s of something else."""
    step = report(op(flops=30, bytes=4), op("aten.add", kind="pointwise", bytes=10))
    found = half_precision(step, machine(peaks={"bfloat16": 4.0}), Setting())
    assert found is not None
    assert found.gain == pytest.approx(40 / (40 - 22.5) - 1)
    assert half_precision(step, machine(), Setting()) is None


def test_what_is_measured_of_waiting() -> None:
    measured = {"data": 1.0, "forward": 2.0, "backward": 0.5, "waiting": 0.5}
    step, setting = report(op(flops=4)), Setting(measured, num_workers=0, is_offloaded=True)
    data, tier = more_workers(step, machine(), setting), nearer_tier(step, machine(), setting)
    assert data is not None
    assert tier is not None
    assert data.gain == pytest.approx(4 / 3 - 1)
    assert "there are none" in data.text
    assert tier.gain == pytest.approx(4 / 3.5 - 1)
    assert more_workers(step, machine(), Setting(measured)) is None  # whose loader is not known
    assert nearer_tier(step, machine(), Setting(measured)) is None


def test_without_a_drive_commits_go_too() -> None:
    """8 s, of which 2 are waits and 2 commits: 4 are left, twice as many steps."""
    measured = {"forward": 4.0, "waiting": 2.0, "commit": 2.0}
    tier = nearer_tier(report(op()), machine(), Setting(measured, is_offloaded=True))
    assert tier is not None
    assert tier.gain == pytest.approx(1)


def test_what_helps_most_comes_first_and_what_does_not_is_left_out() -> None:
    measured = {"data": 0.001, "forward": 1.0}
    again = op(phase="recompute", flops=10)
    found = advise(report(op(flops=20), again), machine(1), Setting(measured, num_workers=2))
    assert [each.name for each in found] == ["no recomputation", "larger micro-batch"]
    assert str(found[0]).endswith("(+52.4%)")  # 32 s for 21


class Blocks(nn.Module):
    """Two Linear layers, the first one perhaps computed again."""

    def __init__(self, recomputes: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.recomputes = recomputes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recomputes:
            x = checkpoint(lambda x: self.first(x).tanh().sin(), x, use_reentrant=False)
        else:
            x = self.first(x).tanh().sin()
        return self.second(x).square().mean()


def test_the_gain_of_recomputing_nothing_is_that_of_a_step_that_does_not() -> None:
    """Of real steps, by the same roofline; a checkpoint's own bookkeeping moves nothing."""
    x = torch.randn(32, 64)
    hardware = MachineBalance("m", 1e9, 1e9)
    reports = {}
    for recomputes in (True, False):
        model = Blocks(recomputes)
        reports[recomputes] = analyze_step(model, lambda model=model: model(x))
    found = no_recomputation(reports[True], hardware, Setting())
    seconds = {
        key: sum(hardware.kernel_seconds(r) for r in each.trace.records)
        for key, each in reports.items()
    }
    assert found is not None
    assert found.gain == pytest.approx(seconds[True] / seconds[False] - 1)
    assert found.gain > 0.05
