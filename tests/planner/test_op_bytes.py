"""Bytes of single operations against hand counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_align.planner import op_bytes, op_flops
from lightning_align.planner.op_bytes import stored_bytes
from lightning_align.planner.records import Trace
from lightning_align.planner.trace import tracing


def traced(fn: Callable[[], Any]) -> Trace:
    with tracing(nn.Identity(), []) as trace:
        fn()
    return trace


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


IDS = torch.tensor([0, 2, 2, 5])
A, B, ROW, TABLE = ones(8, 16), ones(8, 16), ones(16), ones(100, 16)
N = A.nbytes  # 512
GRAD, GAIN = ones(4, 16), ones(16)
Q = ones(2, 4, 8, 16)  # 4 kB
STATES, COUNT = [ones(8, 16) for _ in range(4)], ones()
# name -> what runs, bytes by hand
HAND: dict[str, tuple[Callable[[], Any], int]] = {
    "sum of vectors": (lambda: A + B, 3 * N),
    "a row is broadcast": (lambda: A + ROW, 2 * N + 64),
    "an expanded row is read once": (lambda: A + ROW.expand(8, 16), 2 * N + 64),
    "a tensor times itself": (lambda: A * A, 2 * N),
    "in place": (lambda: A.clone().add_(B), 2 * N + 3 * N),
    "product": (lambda: A @ ones(16, 4), 4 * 64 + N + 256 + 128),  # its factor is written first
    "product and bias": (
        lambda: torch.addmm(ROW, A, TABLE[:16].t()),
        64 + N + 1024 + N,
    ),
    "batched product": (lambda: torch.bmm(Q[0], Q[1].transpose(1, 2)), 2 * 2048 + 4 * 8 * 8 * 4),
    "views": (lambda: A.t()[3:].unsqueeze(0).expand(4, -1, -1).detach(), 0),
    "copy": (lambda: A.t().contiguous(), 2 * N),
    "to half the width": (lambda: A.to(torch.bfloat16), N + N // 2),
    "concatenation": (lambda: torch.cat([A, B]), 4 * N),
    "lookup": (lambda: F.embedding(IDS, TABLE), 32 + 2 * 4 * 64),
    "backward of a lookup": (
        lambda: torch.ops.aten.embedding_dense_backward(GRAD, IDS, 100, -1, False),
        GRAD.nbytes + 32 + TABLE.nbytes,
    ),
    "selected rows": (lambda: TABLE[IDS], 32 + 2 * 4 * 64),
    "gathered": (lambda: A.gather(1, ones(8, 1, dtype=torch.long) * 3), 8 * 8 * 4 + 2 * 32),
    "added to rows": (lambda: TABLE.index_add_(0, IDS, GRAD), 32 + 3 * 256),
    "sum": (lambda: A.sum(0), N + 64),
    "softmax": (lambda: A.softmax(-1), 2 * N),
    "layer norm": (lambda: F.layer_norm(A, (16,), GAIN, ROW), 2 * N + 128 + 2 * 32),
    "gelu": (lambda: F.gelu(A), 2 * N),
    "attention": (lambda: F.scaled_dot_product_attention(Q, Q, Q), 2 * Q.nbytes + 2 * 4 * 8 * 4),
    "zeros like": (lambda: torch.zeros_like(A), N),
    "empty": (lambda: torch.empty_like(A), 0),
    "filled": (lambda: torch.empty(8, 16).normal_(), N),
    "overwritten": (lambda: torch.empty(8, 16).copy_(A), 2 * N),
    "written into a result": (lambda: torch.add(A, B, out=torch.empty(8, 16)), 3 * N),
    "negative log-likelihood": (
        lambda: F.nll_loss(TABLE, ones(100, dtype=torch.long), reduction="sum"),
        800 + 800 + 400 + 4 + 4,  # targets are made; they and a logit each are read; two sums
    ),
    "lists": (lambda: torch._foreach_add_([A, B], [B, A]), 4 * N),
    "fused AdamW": (  # parameters, gradients and two moments; no gradient is written
        lambda: torch._fused_adamw_(
            *([ones_] for ones_ in STATES),
            [],
            [COUNT],
            lr=1e-3,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        ),
        7 * N + 4,
    ),
    "scalar": (lambda: A[0, 0].item(), 4),
}


@pytest.mark.parametrize("name", HAND)
def test_bytes_match_hand_counts(name: str) -> None:
    run, by_hand = HAND[name]
    assert sum(record.bytes for record in traced(run).records) == by_hand


def test_the_pair_of_the_lecture() -> None:
    """A sum of vectors has a FLOP for 12 bytes, a product of n x n matrices n / 6 FLOPs a byte."""
    a, b = ones(64, 64), ones(64, 64)
    (added,) = traced(lambda: a + b).records
    assert added.pointwise_flops * 12 == added.bytes
    (multiplied,) = traced(lambda: a @ b).records
    assert multiplied.flops / multiplied.bytes == 64 / 6


def test_views_that_counted_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    op = op_flops.describe(torch.ops.aten.t.default)
    assert op_bytes.traffic(op, (A,), {}, A.t()).bytes == 0
    monkeypatch.setattr(op_bytes, "VIEW", "a kind that nothing is of")
    assert op_bytes.traffic(op, (A,), {}, A.t()).bytes == 2 * N


@pytest.mark.parametrize(
    ("tensor", "elements"),
    [
        (torch.ones(4, 1).expand(4, 9), 4),
        (torch.ones(8)[::2], 4),
        (torch.ones(10).unfold(0, 4, 1), 10),
        (torch.ones(0, 3).t(), 0),
        (torch.ones(3, 5).t(), 15),
        (torch.ones(1).expand(1000), 1),
        (torch.tensor([0.0, 2.0, 0.0]).to_sparse(), 3),  # a place of 8 bytes, and what is there
    ],
)
def test_what_is_stored_of_a_tensor(tensor: Tensor, elements: int) -> None:
    assert stored_bytes(tensor) == 4 * elements
