"""Parameters whose values are on another rank: a shape that says so."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_align.strategies.pipeline.absent import Absent, AbsentParameter
from lightning_align.strategies.pipeline.passage import ChainError


def test_what_is_absent_can_be_loaded_moved_and_copied() -> None:
    layer = nn.Linear(2, 3)
    layer.weight = AbsentParameter(torch.empty(3, 2, device="meta"))
    layer.load_state_dict({"weight": torch.ones(3, 2), "bias": torch.ones(3)})
    assert layer.double().weight.dtype == torch.float64
    assert copy.deepcopy(layer).weight.shape == (3, 2)
    assert layer.state_dict()["weight"].is_meta
    assert layer.weight.grad is None
    torch.optim.AdamW(layer.parameters()).step()
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    with pytest.raises(ValueError, match="linear is given a weight of another stage"):
        layer(torch.ones(1, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="add is given a weight of another stage"):
        torch.ones(()) + layer.weight.norm()


def absent(*shape: int) -> AbsentParameter:
    return AbsentParameter(torch.empty(shape, device="meta"))


def test_what_is_made_of_absent_values_alone_is_absent_too() -> None:
    made = (absent(3, 2) @ absent(2, 3)).square()
    assert (type(made), made.shape, made.is_meta) == (Absent, (3, 3), True)
    assert all(type(part) is Absent for part in absent(3, 2).split(1))
    with pytest.raises(ChainError, match="mul is given a weight of another stage"):
        made * torch.ones(3)


@pytest.mark.parametrize("ask", [Tensor.item, Tensor.tolist, bool, float, int])
def test_a_value_that_is_absent_is_not_made_up(ask: Callable[[Tensor], object]) -> None:
    with pytest.raises(ValueError, match=r"whose values are on another rank\. Let weights be used"):
        ask(absent())


def test_values_in_any_place_of_the_arguments_are_seen() -> None:
    weight = absent(2)
    for computed in (
        lambda: torch.stack([weight, torch.ones(2)]),
        lambda: torch.cat(tensors=(torch.ones(2), weight)),
        lambda: torch.where(torch.tensor([True, False]), weight, weight),
    ):
        with pytest.raises(ChainError):
            computed()


def test_form_and_gradient_are_told_as_of_any_parameter() -> None:
    weight = absent(3, 2)
    assert (weight.shape, weight.requires_grad, weight.device.type) == ((3, 2), True, "meta")
    weight.grad = torch.empty(3, 2, device="meta")
    assert isinstance(weight.grad, Absent)
    weight.grad = None
    assert weight.grad is None
