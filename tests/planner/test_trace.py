"""What is written down of each operation."""

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lightning_align.planner.records import Region
from lightning_align.planner.trace import IS_TRACING, tracing


def test_operations_are_written_down_in_order() -> None:
    model = nn.Linear(4, 3, bias=False)
    x = torch.ones(2, 8)
    with tracing(model, list(model.parameters())) as trace:
        model(x[:, 4:]).exp()
    product, exponential = trace.records
    assert (product.name, product.kind, product.phase) == ("aten.mm", "product", "forward")
    assert product.scope == ("",)
    assert product.flops == 2 * 2 * 4 * 3
    assert product.dtype is torch.float32
    assert set(product.reads) == {Region(0, 0, 48), Region(1, 16, 32)}  # the weight came first
    assert product.writes == (Region(2, 0, 24),)
    assert exponential.reads == product.writes
    assert (exponential.flops, exponential.pointwise_flops, exponential.bytes) == (0, 6, 48)


def test_lists_of_tensors_are_one_operation() -> None:
    with tracing(nn.Identity(), []) as trace:
        torch._foreach_mul([torch.ones(4)] * 3, 2.0)
    last = trace.records[-1]
    assert (last.tensors, last.pointwise_flops) == (3, 12)


def test_tracing_ends_with_its_context() -> None:
    assert not IS_TRACING.get()
    with tracing(nn.Identity(), []) as trace:
        assert IS_TRACING.get()
        kept = torch.ones(4)
    kept + kept
    assert len(trace.records) == 1
    del kept
    assert trace.storages.peak == 16


def test_what_is_saved_of_sparse_matrices_is_not_that_of_another_tensor() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    with tracing(nn.Identity(), []) as trace:
        torch.sparse.mm(torch.eye(3).to_sparse(), x).sum().backward()
    assert -1 not in {number for numbers in trace.saved_by.values() for number in numbers}


class Exponential(torch.autograd.Function):
    """Saves its result."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] * ctx.saved_tensors[0]


@pytest.mark.parametrize("exp", [torch.exp, torch.exp_, Exponential.apply])
def test_what_no_backward_lets_go_of_is_freed(exp: Any) -> None:
    """A result that is saved must not keep itself alive."""
    x = torch.ones(8, requires_grad=True)
    with tracing(nn.Identity(), [x]) as trace:
        y = exp(x * 2)
        followed = weakref.ref(y.untyped_storage())
        del y
        assert followed() is None
    assert trace.saved.peak == 32
    assert [record.name.rstrip("_") for record in trace.records] == ["aten.mul", "aten.exp"]
    assert not trace.views
