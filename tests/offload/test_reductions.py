"""Training on two ranks, of which each stores and updates its section, against DDP."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from lightning_align.offload import block
from lightning_align.offload.ranks import Ranks
from tests.helpers.offloaded_network import network, offloaded
from tests.helpers.ranks import run_ranks

WIDTH = 44  # sections end in the middle of weights, at no multiple of 64 of what is left


def train_both(folder, rank, early=False, window=1, unused=(), **memory):
    """Both trainings on this rank; returns the parameters that differ at the end."""
    theirs = network(WIDTH)
    ours = copy.deepcopy(theirs)
    engine = offloaded(folder / str(rank), ours, ranks=Ranks(distributed.new_group()), **memory)
    our_optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, fused=True)
    engine.optimize_with(our_optimizer, fresh=True)
    wrapped = DistributedDataParallel(theirs, find_unused_parameters=bool(unused))
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.1, fused=True)
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(4, window, 5, WIDTH, generator=generator)
    for step in inputs:
        for number, x in enumerate(step):
            closes = number == window - 1
            with nullcontext() if closes else wrapped.no_sync():
                wrapped(x).square().mean().backward()
            with engine.forward():
                loss = ours(x).square().mean()
            with engine.backward(updates=early and closes, closes=closes):
                loss.backward()
        norms = [p.grad.norm() for p in theirs.parameters()]
        # Those of cut weights are put together from squares, in another order.
        assert torch.allclose(
            torch.stack(engine.gradients.norms_of(ours.parameters())), torch.stack(norms), rtol=1e-6
        )
        their_optimizer.step()
        their_optimizer.zero_grad()
        engine.updates.step()
    values = engine.whole.values()
    engine.close()
    if rank:
        return []  # the first has the values
    return [
        n for n, p in ours.named_parameters() if not torch.equal(values[p], theirs.get_parameter(n))
    ]


@pytest.mark.parametrize("gradients", [False, True], ids=["on disk", "in memory"])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("early", [False, True], ids=["after backward", "in backward"])
def test_two_ranks_train_as_ddp(tmp_path, early, window, gradients):
    def run(rank):
        return train_both(tmp_path, rank, early, window, gradients=gradients, group_bytes=1)

    assert run_ranks(run) == [[], []]


def test_without_padding_two_ranks_train_otherwise(tmp_path, monkeypatch):
    """Vector kernels treat the end of a piece differently, and pieces would end anywhere."""
    monkeypatch.setattr(block, "PADDING", 1)
    monkeypatch.setattr(block, "_WIDEST", 4)
    monkeypatch.setattr(block, "ALIGNMENT", 4)

    def run(rank):
        return train_both(tmp_path, rank)

    assert any(run_ranks(run))
