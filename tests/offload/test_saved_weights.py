"""Autograd keeps notes of weights, and is told of those that it cannot have."""

import gc

import pytest
import torch

from tests.helpers.offloaded_network import network, offloaded


def test_nothing_that_is_saved_for_backward_holds_a_weight(tmp_path):
    module = network()
    engine = offloaded(tmp_path, module)
    engine.store.settle_all()  # what is being written is in memory, too
    gc.collect()
    engine.pool.trim()
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
