"""What we rely on in private APIs of torch, on the pinned version."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_align._compat.torch_modules import (
    BeforeDraws,
    call_module,
    has_spectral_norm,
    intercept_calls,
    is_compiled,
    is_in_reentrant_checkpoint,
    one_group_of_gradients,
    outside_of_modes,
    storage_key,
)


def test_every_draw_into_a_tensor_is_announced_and_nothing_else() -> None:
    weight, seen = nn.Parameter(torch.empty(4, 4)), []
    torch.manual_seed(0)  # trunc_normal_ draws again where it left the bounds
    with torch.no_grad(), BeforeDraws(lambda tensor: seen.append(tensor.data_ptr())):
        nn.init.kaiming_uniform_(weight)
        weight.zero_()
        weight[1:].normal_()
        nn.init.trunc_normal_(weight)
    row = weight.stride(0) * weight.element_size()
    assert seen == [weight.data_ptr(), weight.data_ptr() + row, weight.data_ptr()]


def test_calls_are_intercepted_with_their_hooks_and_copies_are_free_of_it() -> None:
    layer, hooked = nn.Linear(2, 2), []
    layer.register_forward_hook(lambda *_: hooked.append(1))
    inputs = torch.ones(1, 2)
    theirs = layer(inputs)
    intercept_calls(layer, lambda *args, **kwargs: ("called", args, kwargs))
    assert is_compiled(layer)  # it is where torch puts what it compiles
    assert layer(inputs, a=1) == ("called", (inputs,), {"a": 1})
    assert hooked == [1]
    assert call_module(layer, inputs).equal(theirs)
    assert hooked == [1, 1]
    assert copy.deepcopy(layer)(inputs).equal(theirs)
    intercept_calls(layer, None)
    assert layer(inputs).equal(theirs)
    assert not is_compiled(layer)
    layer.compile()
    assert is_compiled(layer)
    assert is_compiled(torch.compile(nn.Linear(2, 2)))


def test_a_storage_is_known_through_views_and_detached_tensors() -> None:
    tensor = torch.zeros(2, 2, requires_grad=True)
    assert storage_key(tensor) == storage_key(tensor[0].detach()) == storage_key(tensor.view(4))
    assert storage_key(tensor) != storage_key(tensor.clone())
    assert storage_key(torch.ones(2, 2).to_sparse()) is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_reentrant_checkpoint_is_seen_from_inside(reentrant: bool) -> None:
    seen = []

    def inside(tensor: Tensor) -> Tensor:
        seen.append(is_in_reentrant_checkpoint())
        return tensor * 2

    checkpoint(inside, torch.ones(1, requires_grad=True), use_reentrant=reentrant)
    assert seen == [reentrant]
    assert not is_in_reentrant_checkpoint()


def test_a_norm_takes_gradients_of_all_dtypes_in_one_group() -> None:
    seen = []

    class Seeing(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch._foreach_norm:
                seen.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    gradients = [torch.ones(2), torch.ones(2, dtype=torch.float64), torch.ones(2)]
    with one_group_of_gradients(torch.device("cpu")), Seeing():
        ours = nn.utils.get_total_norm(gradients)
    assert seen == [3]
    torch.testing.assert_close(ours, nn.utils.get_total_norm(gradients))


def test_spectral_norms_of_both_kinds_are_known() -> None:
    kinds = [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm]
    normed = [kind(nn.Linear(2, 2)) for kind in kinds]
    assert all(has_spectral_norm(layer) for layer in normed)
    weight_normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert not has_spectral_norm(weight_normed)


def test_outside_of_modes_functions_are_torchs_own() -> None:
    class Counts(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            Counts.seen += 1
            return func(*args, **(kwargs or {}))

    with Counts():
        torch.ones(2).sum()
        seen = Counts.seen
        with outside_of_modes():
            torch.ones(2).sum()
        assert Counts.seen == seen > 0
