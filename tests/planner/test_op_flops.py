"""What operations are, and FLOPs of those that torch has no formula for."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from lightning_align.planner.op_flops import OURS, describe, pointwise_flops, product_flops
from lightning_align.planner.trace import tracing

aten = torch.ops.aten


def test_torchs_formulas_come_first() -> None:
    """As soon as torch has one for an operation of ours, ours is not used."""
    theirs: Any = FlopCounterMode(display=False).flop_registry
    assert describe(aten.mm.default).formula is theirs[aten.mm]
    known = {str(packet) for packet in theirs}
    assert not known & set(OURS), "torch has a formula now: take ours away"


def test_every_formula_of_ours_is_for_an_operation_of_torch() -> None:
    for name in OURS:
        assert hasattr(aten, name.removeprefix("aten."))


@pytest.mark.parametrize(
    ("func", "kind"),
    [
        (aten.mm.default, "product"),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, "attention"),
        (aten.add.Tensor, "pointwise"),
        (aten.add_.Tensor, "pointwise"),
        (aten._foreach_addcmul_.Scalar, "pointwise"),
        (aten.sum.dim_IntList, "reduction"),
        (aten._softmax.default, "norm"),
        (aten.clone.default, "move"),
        (aten.copy_.default, "move"),
        (aten.transpose.int, "view"),
        (aten.transpose_.default, "view"),
        (aten._unsafe_view.default, "view"),
        (aten.linalg_svd.default, "unknown"),
    ],
)
def test_kinds(func: Any, kind: str) -> None:
    assert describe(func).kind == kind


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
def test_attention_for_the_processor_has_two_products_and_five(heads: int, key_heads: int) -> None:
    """torch's own formulas, of the same attention on another device, say the same."""
    query = torch.ones(2, heads, 12, 8, device="meta")
    key = torch.ones(2, key_heads, 20, 8, device="meta")
    forward = describe(aten._scaled_dot_product_flash_attention_for_cpu.default)
    backward = describe(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
    theirs: Any = FlopCounterMode(display=False).flop_registry
    ours = product_flops(forward, (query, key, key), {}, None)
    assert ours == theirs[aten._scaled_dot_product_flash_attention](query, key, key)
    assert ours == 2 * 2 * (2 * heads * 12 * 20 * 8)
    ours = product_flops(backward, (query, query, key, key), {}, None)
    peer = theirs[aten._scaled_dot_product_flash_attention_backward]
    assert ours == peer(query, query, key, key) == 5 * 2 * (2 * heads * 12 * 20 * 8)


def test_products_of_vectors() -> None:
    matrix, vector = torch.ones(3, 5), torch.ones(5)
    with tracing(nn.Identity(), []) as trace:
        torch.mv(matrix, vector), torch.dot(vector, vector)
        torch.addmv(torch.ones(3), matrix, vector)
    flops = {record.name: record.flops for record in trace.records if record.flops}
    assert flops == {"aten.mv": 30, "aten.dot": 10, "aten.addmv": 30}


def test_products_in_place_are_products() -> None:
    """torch's counter passes over them, and our chunked loss makes its gradients with them."""
    c, a = torch.zeros(4, 4), torch.ones(4, 8)
    with tracing(nn.Identity(), []) as trace, FlopCounterMode(display=False) as theirs:
        c.addmm_(a, a.t())
        c[None].baddbmm_(a[None], a.t()[None])
        torch.mm(a, a.t(), out=c)
    assert [record.flops for record in trace.records] == [256] * 3
    assert theirs.get_total_flops() == 256
    assert not trace.uncounted


def test_experts_multiply_each_row_once() -> None:
    op = describe(aten._grouped_mm.default)
    rows, experts = torch.ones(6, 8), torch.ones(4, 8, 16)
    assert product_flops(op, (rows, experts), {}, None) == 2 * 6 * 8 * 16
    assert product_flops(op, (experts, torch.ones(4, 16, 2)), {}, None) == 2 * 4 * 8 * 16 * 2
    assert product_flops(op, (torch.ones(8, 6), rows), {}, None) == 2 * 8 * 6 * 8


def test_pointwise_flops_are_of_the_elements() -> None:
    a, row = torch.ones(8, 16), torch.ones(16)
    assert pointwise_flops(describe(aten.add.Tensor), (a, row), a) == 128
    assert pointwise_flops(describe(aten.sum.dim_IntList), (a, [0]), row) == 128
    assert pointwise_flops(describe(aten._softmax.default), (a, -1, False), a) == 5 * 128
    assert pointwise_flops(describe(aten.addcmul_.default), (a, a, a), a) == 3 * 128
    assert pointwise_flops(describe(aten._foreach_mul_.Scalar), ([a, a], 2.0), None) == 256
    assert pointwise_flops(describe(aten.clone.default), (a,), a) == 0
    assert pointwise_flops(describe(aten.mm.default), (a, a), a) == 0


def test_a_models_usual_operations_are_all_known() -> None:
    class Usual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.rms = nn.LayerNorm(8), nn.RMSNorm(8)
            self.conv = nn.Conv1d(4, 4, 3, padding=1)

        def forward(self, x: Any) -> Any:
            x = self.rms(self.norm(self.conv(x))) + F.silu(x) * torch.sigmoid(x)
            x = F.dropout(F.relu(x), 0.1).cumsum(-1).clamp(0, 3).roll(1, -1)
            chosen = x.masked_fill(x > 1, 0.5).topk(2).values + x.std(-1, keepdim=True)
            return chosen.mean() + x.norm() + x.abs().max() + x.pow(2).rsqrt().logsumexp(0).sum()

    model = Usual()
    with tracing(model, []) as trace:
        model(torch.rand(2, 4, 8)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
            kind(model.parameters(), lr=0.1, foreach=True).step()
        torch.optim.AdamW(model.parameters(), fused=True).step()
    assert trace.uncounted == {}
