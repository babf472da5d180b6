"""What is written down of a step: one account of operations, memory and what autograd holds."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_align.planner.records import Trace
from lightning_align.planner.trace import tracing


def step() -> Trace:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 8), nn.Linear(8, 6)
    model = nn.Sequential(first, nn.Tanh(), second)
    x = torch.randn(5, 6)

    def block(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(x)
        return out

    with tracing(model, list(model.parameters())) as trace:
        loss = checkpoint(block, x, use_reentrant=False).square().sum()
        loss.backward()
    return trace


def test_whatever_is_read_or_written_lies_in_memory_that_was_seen() -> None:
    trace = step()
    sizes = trace.storages.sizes
    regions = [region for record in trace.records for region in (*record.reads, *record.writes)]
    assert {region.storage for region in regions} <= set(range(len(sizes)))
    for region in regions:
        assert region.offset >= 0
        assert region.offset + region.bytes <= sizes[region.storage]


def test_each_new_memory_is_made_by_one_operation() -> None:
    trace = step()
    made = [size for record in trace.records for size in record.made]
    new = set(range(len(trace.storages.sizes))) - trace.storages.there
    assert sorted(made) == sorted(trace.storages.sizes[number] for number in new)


def test_what_a_checkpoint_ran_again_are_operations_of_that_phase() -> None:
    trace = step()
    (again,) = trace.checkpoints
    recomputed = {i for i, record in enumerate(trace.records) if record.phase == "recompute"}
    assert recomputed <= set(range(again.first, again.last + 1))
    # The second product is not among them: nothing behind its input is asked for.
    assert sum(trace.records[i].flops for i in recomputed) == 2 * 5 * 6 * 8
    assert again.saved >= 3  # of each product and of tanh
