"""Gradients leave ``p.grad`` block by block, whichever of them a backward comes to."""

import copy

import pytest
import torch

from tests.helpers.offloaded_network import network, offloaded
from tests.helpers.stand_in_device import DelayedCopies


@pytest.fixture(params=[False, True], ids=["host", "device"])
def engine_of(request, tmp_path):
    def build(module):
        engine = offloaded(tmp_path, module)
        if request.param:
            engine.compute_on(DelayedCopies())
        return engine

    return build


def test_sums_are_there_behind_backward_and_nothing_in_grad(engine_of):
    theirs = network()
    ours = copy.deepcopy(theirs)
    x = torch.randn(2, 3, 6)
    engine = engine_of(ours)
    for part in x:
        theirs(part).sum().backward()
        with engine.forward():
            loss = ours(part).sum()
        with engine.backward(updates=False):
            loss.backward()
        assert not any(parameter.grad is not None for parameter in ours.parameters())
    sums = engine.gradients.shown()
    assert sums.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(sums[name], parameter.grad), name
    engine.close()


def test_what_was_put_into_grad_is_added_to(engine_of):
    """As where a user's code has left it, or a block's other parameters got none."""
    ours, theirs = network(), network()
    for module in (ours, theirs):
        module[1][0].bias.grad = torch.ones(9)
        module[2][0].requires_grad_(False)
    x = torch.randn(3, 6)
    theirs(x).sum().backward()
    engine = engine_of(ours)
    with engine.forward():
        loss = ours(x).sum()
    with engine.backward(updates=False, factor=torch.tensor(0.5)):
        loss.backward()
    engine.scale_gradients(torch.tensor(0.5), ours.parameters())
    sums = engine.gradients.shown()
    assert "2.0.weight" not in sums
    assert torch.equal(sums["1.0.bias"], theirs[1][0].bias.grad * 0.5)
    assert torch.equal(sums["2.2.weight"], theirs[2][2].weight.grad * 0.5)
    engine.close()


def test_a_backward_that_fails_leaves_nothing_under_way(engine_of):
    module = network()
    engine = engine_of(module)

    def fail(_):
        raise RuntimeError("enough")

    with engine.forward():
        hidden = module[:2](torch.randn(3, 6))
        hidden.register_hook(fail)
        loss = module[2:](hidden).sum()
    with pytest.raises(RuntimeError, match="enough"), engine.backward(updates=False):
        loss.backward()
    assert not any(block.users for block in engine.blocks)
    with engine.forward():
        loss = module(torch.randn(3, 6)).sum()
    with engine.backward(updates=False):
        loss.backward()
    engine.close()
