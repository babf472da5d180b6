import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from lightning_align._compat import torch_attention as kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_calls_are_those_of_scaled_dot_product_attention(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(
        torch.randn(1, 2, size, 8, generator=generator).to(dtype).requires_grad_()
        for size in (3, 7, 7)
    )
    mask = torch.full((3, 7), -torch.inf, dtype=dtype).triu(5)[None, None]
    theirs = F.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=0.3)
    grad = torch.randn(theirs.shape, generator=generator).to(dtype)
    their_gradients = torch.autograd.grad(theirs, tensors, grad)
    assert kernel.is_here()
    with torch.no_grad():
        results = kernel.forward(*tensors, mask, 0.3)
        gradients = kernel.backward(grad, tensors, results, mask, 0.3)
    assert torch.equal(results[0], theirs)
    assert all(map(torch.equal, gradients, their_gradients))


def test_other_operators_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.is_here.cache_clear()
    monkeypatch.setattr(kernel, "_FORWARD", "no_such_operator")
    try:
        assert not kernel.is_here()
    finally:
        kernel.is_here.cache_clear()
