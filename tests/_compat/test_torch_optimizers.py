"""Private parts of torch's optimizers."""

import torch
from torch import nn

from lightning_align._compat.torch_optimizers import step_with_hooks, unhooked_step


def optimizer_with_gradient():
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    return parameter, torch.optim.SGD([parameter], lr=0.5)


def test_the_step_of_the_class_is_called_without_hooks() -> None:
    parameter, optimizer = optimizer_with_gradient()
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    unhooked_step(optimizer)()
    assert torch.equal(parameter, torch.full((3,), 0.5))
    assert not called


def test_hooks_are_called_once_and_schedulers_know_of_the_step(recwarn) -> None:
    _, optimizer = optimizer_with_gradient()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    vars(optimizer)["step"] = step_with_hooks(optimizer, lambda _, closure: closure())
    assert optimizer.step(closure=lambda: called.append("in") or 3) == 3
    assert called == ["before", "in", "after"]
    scheduler.step()
    assert not recwarn.list
