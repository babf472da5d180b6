"""Gradients that are there before Lightning's backward, and outlive its zeroing."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_align.strategies.pipeline.early_gradients import EarlyGradients


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.here, self.there = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")


def filled() -> tuple[Module, torch.optim.Optimizer, EarlyGradients]:
    module = Module()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    early = EarlyGradients(module)
    for parameter in module.here.parameters():
        parameter.grad = torch.ones_like(parameter)
    return module, optimizer, early


def test_what_is_kept_is_not_zeroed_and_then_is_again() -> None:
    module, optimizer, early = filled()
    early.keep([optimizer])
    optimizer.zero_grad()
    assert module.here.weight.grad is not None
    early.release([optimizer])
    assert "zero_grad" not in vars(optimizer)
    optimizer.zero_grad()
    assert module.here.weight.grad is None


def test_a_window_begins_without_gradients() -> None:
    module, _, early = filled()
    early.begin_window()
    assert all(parameter.grad is None for parameter in module.parameters())


def test_gradients_that_are_wiped_in_another_way_are_refused() -> None:
    module, optimizer, early = filled()
    early.keep([optimizer])
    module.here.bias.grad = None
    rule = r"\(model='Module\.optimizer_zero_grad'\): must zero gradients through optimizer\.zero"
    with pytest.raises(ValueError, match=rule):
        early.release([optimizer])
    optimizer.zero_grad()
    assert module.here.weight.grad is None, "it zeroes again also after a refusal"


def test_parameters_that_have_come_since_count_from_the_next_window_on() -> None:
    module, optimizer, early = filled()
    module.there.to_empty(device="cpu")
    early.begin_window()
    early.keep([optimizer])
    module.there.weight.grad = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="must zero gradients"):
        early.release([optimizer])
