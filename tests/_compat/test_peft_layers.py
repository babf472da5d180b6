"""PEFT's layers switched off and on: outputs are the base's, and nobody's training is touched."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_align._compat.peft_layers import peft_layers, switched_off

peft = pytest.importorskip("peft")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


def adapted() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A model with LoRA in one layer and the other one trained whole; an input, and its output."""
    torch.manual_seed(0)
    base, x = Two(), torch.randn(5, 3)
    before = base(x).detach()
    config = peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"])
    peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return base, x, before


def test_off_is_the_base_and_on_is_what_it_was() -> None:
    model, x, before = adapted()
    on = model(x)
    with switched_off(model):
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), on)
    assert not torch.equal(on, before)
    assert list(peft_layers(model)) == ["first", "second"]


def test_what_trains_is_not_touched_also_after_an_error() -> None:
    model, x, _ = adapted()
    frozen = model.first.lora_A["default"].weight
    frozen.requires_grad_(False)
    model(x).sum().backward()  # gradients wait for their step

    def trains() -> dict[str, bool]:
        return {name: p.requires_grad for name, p in model.named_parameters()}

    before = trains()
    with switched_off(model):
        assert trains() == before
    with pytest.raises(ZeroDivisionError), switched_off(model):
        1 / 0  # noqa: B018
    assert trains() == before
    assert not model.first.disable_adapters
    assert not model.second.disable_adapters


def test_what_was_off_stays_off() -> None:
    model, x, before = adapted()
    model.first.enable_adapters(False)
    with switched_off(model):
        pass
    assert model.first.disable_adapters
    assert not torch.equal(model(x), before)  # the other one is still on


def test_a_model_without_any_is_left_alone() -> None:
    model = Two()
    with switched_off(model):
        assert peft_layers(model) == {}
