"""The optimizer's state: as in memory, put into the files, and forgotten."""

import copy

import pytest
import torch

from lightning_align.offload.optimizer_stream import OptimizerStream
from lightning_align.offload.store import ShardStore
from tests.helpers.offloaded_network import network, offloaded


def stepped(module, optimizer, engine=None):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    if engine is None:
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return
    with engine.forward():
        loss = module(x).square().mean()
    with engine.backward(updates=False):
        loss.backward()
    engine.updates.step()


def both(tmp_path):
    theirs = network()
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, fused=True) for m in (theirs, ours)]
    engine = offloaded(tmp_path, ours)
    engine.optimize_with(optimizers[1], fresh=True)
    return theirs, ours, *optimizers, engine


def assert_same_states(ours, theirs):
    assert list(ours) == list(theirs)
    for key, state in theirs.items():
        assert ours[key].keys() == state.keys()
        assert all(torch.equal(ours[key][name], value) for name, value in state.items())


def test_the_state_is_that_of_memory_and_leaves_nothing_there(tmp_path):
    theirs, ours, their_optimizer, our_optimizer, engine = both(tmp_path)
    for _ in range(2):
        stepped(theirs, their_optimizer)
        stepped(ours, our_optimizer, engine)
    assert_same_states(engine.updates.state()["state"], their_optimizer.state_dict()["state"])
    assert not any("exp_avg" in state for state in our_optimizer.state.values())
    engine.close()


def test_a_state_that_was_loaded_is_stepped_from(tmp_path):
    theirs, ours, their_optimizer, our_optimizer, engine = both(tmp_path)
    stepped(theirs, their_optimizer)
    with engine.whole.gathered(modify=True):
        ours.load_state_dict(theirs.state_dict())
    our_optimizer.load_state_dict(copy.deepcopy(their_optimizer.state_dict()))
    engine.updates.put_state()
    stepped(theirs, their_optimizer)
    stepped(ours, our_optimizer, engine)
    values = engine.whole.values()
    assert all(torch.equal(values[p], theirs.get_parameter(n)) for n, p in ours.named_parameters())
    engine.close()


def test_a_state_that_was_forgotten_begins_anew(tmp_path):
    _, ours, _, our_optimizer, engine = both(tmp_path)
    stepped(ours, our_optimizer, engine)
    engine.updates.forget_state([ours[1][0].weight])
    stepped(ours, our_optimizer, engine)
    steps = {int(state["step"]) for state in engine.updates.state()["state"].values()}
    assert steps == {1, 2}
    assert our_optimizer.state[ours[1][0].weight]["step"] == 1
    engine.close()


@pytest.mark.parametrize("early", [True, False], ids=["in backward", "in the next forward"])
def test_states_are_read_before_what_other_blocks_need(tmp_path, monkeypatch, early):
    """Each block has four groups of state, of which two may be in memory."""
    module = network()
    engine = offloaded(tmp_path, module, group_bytes=1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    engine.optimize_with(optimizer, fresh=True)
    read, ahead = [], []
    read_more, update = ShardStore.read_more, OptimizerStream.update

    def reads(self, name, memory, offset):
        read.append((int(name), "state" if offset else "values"))
        return read_more(self, name, memory, offset)

    def updates(self, block, *args):
        ahead.append(len(block.pieces.keys() & self._reading.keys()))
        return update(self, block, *args)

    monkeypatch.setattr(ShardStore, "read_more", reads)
    monkeypatch.setattr(OptimizerStream, "update", updates)
    for _ in range(4):  # of the first two is learned what follows what
        begun, done = len(read), len(ahead)
        with engine.forward():
            loss = module(torch.ones(1, 6)).square().mean()
        with engine.backward(updates=early):
            loss.backward()
        engine.updates.step()
    assert ahead[done:] == [2, 2, 2, 2]
    read = read[begun:]
    for block in (1, 2) if not early else ():  # the first two are in memory since backward
        own = [place for place, what in enumerate(read) if what == (block, "state")]
        assert own[1] < read.index((block + 1, "values"))
    engine.close()
