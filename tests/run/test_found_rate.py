"""What Lightning's finder of a learning rate is told, and what becomes of what it has found."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_align.run import found_rate


def trainer(*callbacks: Any) -> Any:
    return SimpleNamespace(callbacks=list(callbacks))


def test_a_rate_is_sought_where_a_finder_is() -> None:
    assert found_rate.attributes_sought(trainer()) == ()
    assert found_rate.attributes_sought(trainer(LearningRateFinder())) == ("lr", "learning_rate")
    assert found_rate.attributes_sought(trainer(LearningRateFinder(attr_name="eta"))) == ("eta",)


def test_the_rate_is_of_the_module_or_its_hyperparameters() -> None:
    module = BoringModel()
    assert found_rate.rate_of(module, ("lr", "learning_rate")) is None
    module.save_hyperparameters({"learning_rate": 0.5})
    assert found_rate.rate_of(module, ("lr", "learning_rate")) == 0.5
    assert found_rate.rate_of(module, ()) is None


def test_several_rates_are_refused_and_one_is_set() -> None:
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (0.5, 0.25)]
    optimizer = torch.optim.SGD(groups)
    with pytest.raises(ValueError, match=r"Mine\(optimizer=.*have \[0.5, 0.25\]. Build it with"):
        found_rate.refuse_several("Mine", optimizer)
    found_rate.set_rate(optimizer, 0.125)
    found_rate.refuse_several("Mine", optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
