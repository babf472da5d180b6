"""What a perfect kernel would move, against hand counts."""

import torch
from torch import nn

from lightning_align.planner import analyze_step
from lightning_align.planner.least_traffic import least_bytes, reads_of
from lightning_align.planner.records import Trace
from lightning_align.planner.trace import tracing

A, B = torch.ones(32, 32), torch.ones(32, 32)
N = A.nbytes


def least(trace: Trace, *inside: int) -> int:
    records = trace.records
    chosen = inside or range(len(records))
    return least_bytes(records, chosen, reads_of(records), trace.storages.sizes)


def test_what_is_made_and_used_inside_moves_nothing() -> None:
    with tracing(nn.Identity(), []) as trace:
        c = ((A + B) * A).exp()
    assert sum(record.bytes for record in trace.records) == 8 * N
    assert least(trace) == 3 * N  # A, B and the result
    assert least(trace, 0) == 3 * N
    assert least(trace, 1, 2) == 3 * N
    assert c.shape == A.shape


def test_what_is_used_outside_is_written() -> None:
    with tracing(nn.Identity(), []) as trace:
        c = A + B
        d = c * 2
        (c + d).sum()
    assert least(trace, 0, 1) == 4 * N
    assert least(trace, 2, 3) == 2 * N + 4


def test_parts_of_a_storage_are_read_each() -> None:
    with tracing(nn.Identity(), []) as trace:
        left, right = A.split(16)
        left + right
    assert least(trace) == N + N // 2


def test_in_place_it_is_read_and_written() -> None:
    a = A.clone()
    with tracing(nn.Identity(), []) as trace:
        a.mul_(2).add_(B)
    assert least(trace) == 3 * N


def test_an_update_in_one_kernel_moves_28_bytes_a_parameter() -> None:
    """AdamW reads weight, gradient and two moments, and writes all but the gradient."""
    model = nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.ones(2, 64)
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    report = analyze_step(model, lambda: model(x).sum(), optimizer=optimizer)
    update = [n for n, r in enumerate(report.trace.records) if r.phase == "optimizer"]
    scalars = 64  # its count of steps
    assert 0 <= least(report.trace, *update) - 28 * 64 * 64 <= scalars


def test_forward_and_backward_are_regions_of_their_own() -> None:
    """What is saved goes through memory: a module moves no less than its phases."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
    report = analyze_step(model, lambda: model(A).sum())
    tanh = report.modules["1"]
    assert tanh.least_bytes == tanh.bytes == 2 * N + (2 * N + 4)  # the gradient is one number
