"""What is put back, and when it is not."""

import pytest
import torch
from torch import nn

from lightning_align.planner.as_before import as_before


def test_an_optimizers_first_state_is_taken_back() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters())
    with as_before(model, optimizer):
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        assert not torch.equal(model.weight, weight)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=0, atol=0)
    assert not optimizer.state
    assert model.weight.grad is None


def test_a_gradient_that_was_there_is_the_same_tensor_with_its_values() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    gradient = model.weight.grad
    assert gradient is not None
    values = gradient.clone()
    with as_before(model, None):
        model(torch.ones(2)).sum().backward()
        assert not torch.equal(gradient, values)
        model.zero_grad()
    assert model.weight.grad is gradient
    torch.testing.assert_close(gradient, values, rtol=0, atol=0)


def test_a_change_that_is_meant_stays_unless_something_fails() -> None:
    model = nn.BatchNorm1d(2)
    generator = torch.get_rng_state()
    with as_before(model, None) as change:
        model.eval()
        torch.rand(3)
        change.stays = True
    assert not model.training
    moved = torch.get_rng_state()
    assert not torch.equal(moved, generator)

    def fails() -> None:
        with as_before(model, None) as change:
            model.train()
            torch.rand(3)
            change.stays = True
            raise RuntimeError("at the end")

    with pytest.raises(RuntimeError, match="at the end"):
        fails()
    assert not model.training
    assert torch.equal(torch.get_rng_state(), moved)
