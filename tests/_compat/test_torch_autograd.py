"""What is private in autograd and attention is still there, and means what we take it to mean."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lightning_align._compat.torch_autograd import (
    hooks_give_way,
    is_recomputing,
    is_result,
    next_sequence_number,
    nothing_is_zero_on_meta,
    running_backward,
    running_checkpoint,
    running_node,
    takes_flash_attention,
    without_values,
)


class Noted(torch.autograd.Function):
    """Notes what its backward sees."""

    seen: tuple[bool, Any]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        Noted.seen = running_backward() >= 0, running_node()
        return gradients[0]


def test_the_node_that_runs_has_the_number_it_was_made_with() -> None:
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    before = next_sequence_number()
    z = Noted.apply(y)
    assert next_sequence_number() == before + 1
    z.sum().backward()
    assert Noted.seen == (True, (before, None, False))
    assert running_backward() == -1
    assert running_node() == (None, None, False)


def test_where_a_gradient_is_accumulated_the_leaf_is_known() -> None:
    x = torch.ones(2, requires_grad=True)
    seen: list[Any] = []
    x.register_post_accumulate_grad_hook(lambda _: seen.append(running_node()))
    (x * 2).sum().backward()
    ((number, leaf, again),) = seen
    assert number is None
    assert leaf is x
    assert not again


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_that_computes_again_is_seen(use_reentrant: bool) -> None:
    seen: list[bool] = []

    def block(x: Tensor) -> Tensor:
        seen.append(is_recomputing())
        assert running_node()[2] == seen[-1]
        return x.exp().sin()

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            seen.append(is_recomputing())
            return gradients[0]

    x = torch.ones(2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        Looks.apply(checkpoint(block, Looks.apply(x), use_reentrant=use_reentrant)).sum().backward()
    assert seen == [False, False, True, False]  # forward, after it, again, before it


@pytest.mark.parametrize(("use_reentrant", "saved"), [(False, 2), (True, 0)])
def test_which_checkpoint_computes_again(use_reentrant: bool, saved: int) -> None:
    """Two blocks of two operations, of which the second one is computed again first."""
    seen: list[Any] = []

    def block(x: Tensor) -> Tensor:
        for _ in range(2):
            seen.append(running_checkpoint())
            x = x.sin()
        return x

    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        x = checkpoint(block, x, use_reentrant=use_reentrant)
    x.sum().backward()
    assert seen[:4] == [None] * 4
    second, again, first, _ = seen[4:]
    assert second == again != first
    assert (second[1], first[1]) == (saved, saved)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_which_kernel_attention_gets(device: str) -> None:
    query = torch.ones(1, 2, 8, 4, device=device)
    assert takes_flash_attention(query, query, query, is_causal=True)
    mask = torch.ones(8, 8, dtype=torch.bool, device=device)
    assert takes_flash_attention(query, query, query, attn_mask=mask)
    assert not takes_flash_attention(query, query, query, dropout_p=0.1)
    with sdpa_kernel(SDPBackend.MATH):
        assert not takes_flash_attention(query, query, query)


def test_it_takes_no_memory() -> None:
    long = torch.empty(8, 64, 2**20, 128, device="meta")  # a quarter of a terabyte
    assert takes_flash_attention(long, long, long)


def test_without_values_autocast_is_that_of_the_processor() -> None:
    with without_values():
        x = torch.empty(8, 2**40)
        with torch.autocast("cpu", torch.bfloat16):
            assert (x @ x.t()).dtype is torch.bfloat16
        assert x.device.type == "cpu"


def test_on_meta_all_places_are_found() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool, device="meta")
    with nothing_is_zero_on_meta():
        rows, columns = mask.nonzero(as_tuple=True)
    assert len(rows) == len(columns) == 6
    with pytest.raises(NotImplementedError):
        mask.nonzero()


def test_transforms_run_under_hooks() -> None:
    x, seen = torch.linspace(0, 1, 3), []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    def run(of: Any) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            found: Tensor = of(lambda x: x.exp().square().sum())(x)
            weight = torch.ones(3, requires_grad=True)
            weight.square()
        return found

    with pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):
        run(torch.func.grad)
    with hooks_give_way():
        torch.testing.assert_close(run(torch.func.grad), 2 * (2 * x).exp())
        torch.testing.assert_close(run(torch.func.hessian), torch.diag(4 * (2 * x).exp()))
    assert len(seen) >= 2  # hooks are back behind each
    with pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):
        run(torch.func.grad)


def test_results_are_told_from_what_an_operation_got() -> None:
    seen: list[tuple[str, bool]] = []
    x = torch.ones(3, requires_grad=True) * 1

    def pack(tensor: Tensor) -> Tensor:
        seen.append((str(tensor.grad_fn.name()), is_result(tensor)))  # type: ignore[union-attr]
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        (x.exp() * x).square()
    got = [("ExpBackward0", True), ("MulBackward0", False), ("ExpBackward0", False)]
    assert sorted(seen) == sorted([*got, ("MulBackward0", False)])
