"""A plain torch module whose blocks come and go, against the same module in memory."""

import copy
import gc

import pytest
import torch
from torch import nn

from lightning_align.offload.block import Block
from lightning_align.offload.engine import Memory, OffloadEngine
from lightning_align.offload.files import Threads
from lightning_align.offload.store import ShardStore


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(4))
    )


def offloaded(folder, module, count=2, **memory):
    blocks = [
        Block(name, {f"{name}.{key}": p for key, p in part.named_parameters()})
        for name, part in module.named_children()
    ]
    threads = Threads()
    store = ShardStore(folder, blocks, threads)
    modules = dict(module.named_children())
    engine = OffloadEngine(modules, store, threads, Memory(count, **memory))
    engine.store_values()
    engine.attach()
    return engine


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
        optimizer.step() if engine is None else engine.step()


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
    values = engine.values()
    for name, parameter in ours.named_parameters():
        assert torch.equal(values[parameter], theirs.get_parameter(name)), name
    engine.close()


def test_nothing_that_is_saved_for_backward_holds_a_weight(tmp_path):
    module = network()
    engine = offloaded(tmp_path, module)
    with engine.forward():
        loss = module(torch.randn(2, 6, requires_grad=True)).sum()
    taken = sum(p.stride()[-1] != 0 for p in module.parameters())
    assert taken == 2 * 4  # of two blocks
    gc.collect()
    largest = max(block.nbytes for block in engine.blocks)
    assert engine.pool.allocated_bytes <= 3 * largest  # two are here, and one has been read ahead
    with engine.backward(updates=False):
        loss.backward()
    engine.close()


def test_a_weight_that_is_away_cannot_be_used(tmp_path):
    module = network()
    engine = offloaded(tmp_path, module)
    with (
        pytest.raises(RuntimeError, match=r"Parameter 0\.0\.weight of 0 was used while"),
        engine.forward(),
    ):
        _ = module[0][0].weight * module[0][0].weight
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
    assert torch.equal(engine.waiting_gradients()["0.0.weight"], expected)
    engine.close()
