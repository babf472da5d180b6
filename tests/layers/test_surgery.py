"""An instance has another attribute for a while, and then what it had."""

import pytest
import torch
from torch import nn

from lightning_align.layers.surgery import evaluating, identity, replaced


class Owner:
    name = "of the class"


def test_an_attribute_of_the_class_is_hidden_for_a_while() -> None:
    owner = Owner()
    with replaced(owner, "name", "mine"):
        assert owner.name == "mine"
        assert Owner().name == "of the class"
    assert vars(owner) == {}


def test_an_attribute_of_the_instance_comes_back_after_an_error() -> None:
    owner = Owner()
    owner.name = "its own"
    outer, inner = (replaced(owner, "name", value) for value in ("mine", "again"))
    with pytest.raises(ValueError, match="again"), outer, inner:
        raise ValueError(owner.name)
    assert vars(owner) == {"name": "its own"}


def test_a_module_that_is_the_identity_tells_what_it_is_called_on() -> None:
    module = nn.Linear(2, 3)
    called = []
    module.register_forward_hook(lambda *_: called.append("hook"))
    hidden = torch.ones(1, 2)
    with identity(module) as inputs:
        assert module(hidden) is hidden
    assert inputs == [hidden]
    assert called == ["hook"]
    assert "forward" not in vars(module)
    assert module(hidden).shape == (1, 3)


def test_modes_come_back_after_an_error() -> None:
    part = nn.Sequential(nn.Dropout(), nn.Dropout().eval())

    def fail() -> None:
        with evaluating(part):
            assert not part[0].training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [part.training, part[0].training, part[1].training] == [True, True, False]
