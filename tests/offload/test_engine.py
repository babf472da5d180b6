"""A plain torch module whose blocks come and go, against the same module in memory."""

import copy

import pytest
import torch

from tests.helpers.offloaded_network import network, offloaded

EVERYTHING = ("kept", "is_stored", "states_stay", "gradients_stay")


def train(module, optimizer, engine=None, early=False, steps=5, window=2):
    """Means over two batches a step."""
    inputs = torch.randn(steps, window, 5, 6, generator=torch.Generator().manual_seed(1))
    for step in inputs:
        optimizer.zero_grad()
        for number, x in enumerate(step):
            if engine is None:
                module(x).square().mean().backward()
                continue
            with engine.forward():
                loss = module(x).square().mean()
            with engine.backward(updates=early and number == window - 1):
                loss.backward()
        optimizer.step() if engine is None else engine.updates.step()


@pytest.mark.parametrize("gradients", [False, True], ids=["on disk", "in memory"])
@pytest.mark.parametrize("early", [False, True], ids=["after backward", "in backward"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_training_is_that_of_memory(tmp_path, early, count, gradients):
    theirs = network()
    ours = copy.deepcopy(theirs)
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.1, fused=True))
    engine = offloaded(tmp_path, ours, count, gradients=gradients, group_bytes=1)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, fused=True)
    engine.optimize_with(optimizer, fresh=True)
    train(ours, optimizer, engine, early)
    values = engine.whole.values()
    for name, parameter in ours.named_parameters():
        assert torch.equal(values[parameter], theirs.get_parameter(name)), name
    engine.close()


@pytest.mark.parametrize("early", [False, True], ids=["after backward", "in backward"])
@pytest.mark.parametrize(
    "stays",
    [
        ("kept",),
        ("kept", "gradients_stay"),
        ("kept", "is_stored"),
        ("states_stay", "gradients_stay"),
        EVERYTHING,
    ],
    ids="+".join,
)
def test_what_stays_in_memory_trains_the_same(tmp_path, stays, early):
    """Beside blocks that come and go; two windows, so that what is written is read again."""
    theirs = network()
    ours = copy.deepcopy(theirs)
    expected = torch.optim.AdamW(theirs.parameters(), lr=0.1, fused=True)
    train(theirs, expected)
    engine = offloaded(tmp_path, ours, stays=stays)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, fused=True)
    engine.optimize_with(optimizer, fresh=True)
    train(ours, optimizer, engine, early)
    first = engine.blocks[0]
    assert (first.memory is not None) >= ("kept" in stays)
    large = [v for v in optimizer.state[ours[0][0].weight].values() if v.numel() > 1]
    assert len(large) == 2 * ("states_stay" in stays)
    assert engine.store.commits == (not {"is_stored", "states_stay"} & {*stays})
    values, states = engine.whole.values(), engine.updates.state()["state"]
    for key, (name, parameter) in enumerate(ours.named_parameters()):
        assert torch.equal(values[parameter], theirs.get_parameter(name)), name
        for what, value in expected.state_dict()["state"][key].items():
            assert torch.equal(states[key][what], value)
    engine.close()


def test_a_step_of_what_stays_copies_nothing_and_needs_no_folder(tmp_path):
    module, folder = network(), tmp_path / "none"
    engine = offloaded(folder, module, stays=EVERYTHING, every=1)
    places = [parameter.data_ptr() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(module.parameters())
    engine.optimize_with(optimizer, fresh=True)
    train(module, optimizer, engine, early=True)
    assert places == [parameter.data_ptr() for parameter in module.parameters()]
    assert engine.pool.allocated_bytes == 0
    assert not folder.exists()
    assert (engine.threads.traffic.read, engine.threads.traffic.written) == (0, 0)
    engine.close()


def test_a_block_that_is_called_twice_gets_the_sum_of_both(tmp_path):
    theirs = network()
    ours = copy.deepcopy(theirs)
    x = torch.randn(3, 6)
    theirs[0](theirs(x)).sum().backward()
    expected = theirs[0][0].weight.grad
    engine = offloaded(tmp_path, ours)
    with engine.forward():
        loss = ours[0](ours(x)).sum()
    with engine.backward(updates=False):
        loss.backward()
    assert torch.equal(engine.gradients.shown()["0.0.weight"], expected)
    engine.close()
