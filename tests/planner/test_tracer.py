"""What is noted of operations, and worked out once for all of a kind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.planner import tracer
from lightning_align.planner.records import Record, Trace
from lightning_align.planner.trace import tracing


class Forgetful(dict[Any, Any]):
    """Keeps no kind."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def traced(run: Callable[[], object]) -> Trace:
    with tracing(nn.Identity(), []) as trace:
        run()
    return trace


def squares() -> None:
    a, b = torch.ones(4, 4), torch.ones(4, 4)
    for left, right in ((a, b), (a, a), (a, a.T), (a.T, a.T), (b, a)):
        left @ right
        left * right


def shapes() -> None:
    for wide in (
        torch.ones(3, 4),
        torch.ones(4, 3),
        torch.ones(4, 3).T,
        torch.ones(4).expand(3, 4),
    ):
        wide.exp()
        wide.double().exp()
        wide.sum()
        wide.sum(0)
        wide.mul_(1) if wide.stride(0) else None
    torch.ones(3, 4).as_strided((2, 2), (4, 1), 3).exp()


def lists() -> None:
    a, b = torch.ones(4), torch.ones(6)
    for values in ([a, b], [b, a], [a, a], [a], [a, b, a]):
        torch._foreach_mul(values, 2.0)
        torch._foreach_add_(values, values)
        torch.cat(values)
    a[torch.tensor([0, 1])]
    torch.ones(3, 3)[:, torch.tensor([0])]
    torch.ones(3, 3)[torch.tensor([0])]


def flags() -> None:
    place, value = (torch.tensor([1, 2]),), torch.ones(2)
    for accumulate in (False, True, False):
        torch.zeros(9).index_put_(place, value, accumulate=accumulate)
    for bias in (torch.ones(4), None):
        nn.functional.layer_norm(torch.ones(3, 4), (4,), None, bias)
    nn.Conv2d(2, 2, 3)(torch.ones(1, 2, 5, 5))
    nn.ConvTranspose2d(2, 2, 3)(torch.ones(1, 2, 5, 5))
    torch.add(torch.ones(2), torch.ones(2), alpha=2)
    torch.mul(torch.ones(2), torch.ones(2), out=torch.empty(2))


def values() -> None:
    for mask in (torch.tensor([True, False, True]), torch.tensor([True, False, False])):
        torch.arange(3.0).masked_select(mask)
        mask.nonzero()


def sparse() -> None:
    eye = torch.eye(3).to_sparse()
    torch.sparse.mm(eye, torch.ones(3, 2))
    full = torch.ones(3, 3).to_sparse()
    torch.sparse.mm(full, torch.ones(3, 2))
    for matrix in (eye, full, eye.to_sparse_csr(), full.to_sparse_csr()):
        matrix * 2
        matrix + matrix
        matrix.neg()


@pytest.mark.parametrize("run", [squares, shapes, lists, flags, values, sparse])
def test_what_is_worked_out_once_holds_for_all_of_its_kind(
    run: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracer, "_WORKS", Forgetful())
    each = traced(run)
    monkeypatch.setattr(tracer, "_WORKS", {})
    once, again = traced(run), traced(run)
    assert len(each.records) > 1
    for other in (once, again):
        assert other.records == each.records
        assert other.storages.sizes == each.storages.sizes
        assert other.storages.peak == each.storages.peak


def test_a_kind_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracer, "_WORKS", {})
    found: list[str] = []
    theirs = tracer._work_of

    def counted(call: Any, key: Any) -> Any:
        found.append(call.op.name)
        return theirs(call, key)

    monkeypatch.setattr(tracer, "_work_of", counted)
    a = torch.ones(4, 4)

    def run() -> None:
        for _ in range(3):
            a @ a
            torch._foreach_mul([a, a], 2.0)

    assert len(traced(run).records) == 6
    assert found == ["aten.mm", "aten._foreach_mul"]


def test_kinds_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[Any, Any] = {}
    monkeypatch.setattr(tracer, "_WORKS", kept)
    monkeypatch.setattr(tracer, "_MOST_KINDS", 4)
    a = torch.ones(9)
    trace = traced(lambda: [a[:n].exp() for n in range(9)])
    assert [record.pointwise_flops for record in trace.records] == list(range(9))
    assert len(kept) <= 4


def test_an_operation_that_fails_leaves_nothing() -> None:
    def run() -> None:
        with pytest.raises(RuntimeError):
            torch.ones(2, 3) @ torch.ones(2, 3)
        torch.ones(2).exp()

    names = [record.name for record in traced(run).records]
    assert names == ["aten.ones", "aten.ones", "aten.ones", "aten.exp"]


def test_what_goes_on_in_a_trace_is_behind_what_was_there() -> None:
    a = torch.ones(2)
    first: Record
    with tracing(nn.Identity(), [a]) as trace:
        a.exp()
    (first,) = trace.records
    with tracing(nn.Identity(), [], trace):
        result: Tensor = a.neg()
    assert trace.records[0] is first
    assert trace.records[1].name == "aten.neg"
    assert result.numel() == 2
