"""Training on two ranks, of which each stores and updates its section, against DDP."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from lightning_align.offload import places
from lightning_align.offload.ranks import Ranks
from tests.helpers.covers import cover
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


UPDATES = {"after backward": False, "in backward": True}


@cover(gradients={"on disk": False, "in memory": True}, early=UPDATES, window=[1, 2])
def test_two_ranks_train_as_ddp(tmp_path, early, window, gradients):
    def run(rank):
        return train_both(tmp_path, rank, early, window, gradients=gradients, group_bytes=1)

    assert run_ranks(run) == [[], []]


PLACES = {
    "values in memory": ("is_stored",),
    "state in memory": ("states_stay",),
    "both in memory": ("is_stored", "states_stay"),
    "whole values": ("kept",),
    "whole values, gradients in p.grad": ("kept", "gradients_stay"),
}


@cover(stays=PLACES, early=UPDATES, every=[2, 1])
def test_two_ranks_train_as_ddp_wherever_blocks_lie(tmp_path, early, stays, every):
    def run(rank):
        return train_both(tmp_path, rank, early, window=2, gradients=True, stays=stays, every=every)

    assert run_ranks(run) == [[], []]


@pytest.mark.parametrize("stays", [("is_stored",), ("is_stored", "states_stay"), ("kept",)])
def test_sections_in_memory_can_be_cut_anew(tmp_path, stays):
    """Muon's may not cut a matrix, and are longer then."""

    def run(rank):
        module = network(WIDTH)
        expected = [p.detach().clone() for p in module.parameters()]
        ranks = Ranks(distributed.new_group())
        engine = offloaded(tmp_path / str(rank), module, ranks=ranks, stays=stays)
        length = engine.blocks[0].section_nbytes
        engine.whole.arrange(whole=True)
        assert engine.blocks[0].section_nbytes > length
        with engine.whole.gathered():
            same = all(
                torch.equal(p, e) for p, e in zip(module.parameters(), expected, strict=True)
            )
        engine.close()
        return same

    assert run_ranks(run, 3) == [True] * 3


def test_without_padding_two_ranks_train_otherwise(tmp_path, monkeypatch):
    """Vector kernels treat the end of a piece differently, and pieces would end anywhere."""
    monkeypatch.setattr(places, "PADDING", 1)
    monkeypatch.setattr(places, "_WIDEST", 4)
    monkeypatch.setattr(places, "ALIGNMENT", 4)

    def run(rank):
        return train_both(tmp_path, rank)

    assert any(run_ranks(run))


def step(module, engine):
    with engine.forward():
        loss = module(torch.ones(2, 200)).square().mean()
    with engine.backward(updates=False):
        loss.backward()
    engine.updates.step()


def test_each_rank_moves_its_half_and_the_next_block_is_under_way(tmp_path):
    """Of what a step of one rank reads and writes; and what comes next is gathered ahead."""

    def run(rank, size):
        ranks = Ranks(distributed.new_group()) if size > 1 else Ranks()
        module = network(200)
        engine = offloaded(tmp_path / f"{size}{rank}", module, ranks=ranks, count=3)
        engine.optimize_with(torch.optim.AdamW(module.parameters(), fused=True), fresh=True)
        ahead = []
        for part in module:
            part.register_forward_hook(lambda *_: ahead.append(len(engine.residents._reading)))
        for _ in range(2):
            step(module, engine)
        traffic = engine.threads.traffic
        before = traffic.read, traffic.written
        ahead.clear()
        step(module, engine)
        engine.store.settle_all()
        moved = traffic.read - before[0], traffic.written - before[1]
        engine.close()
        return moved, ahead

    ((whole, _),) = run_ranks(lambda rank: run(rank, 1), 1)
    for moved, ahead in run_ranks(lambda rank: run(rank, 2), 2):
        # One rank reads no block again that is in memory still, at either end of a pass.
        assert moved[0] <= 0.8 * whole[0]
        assert moved[1] == pytest.approx(whole[1] / 2, rel=0.02)
        assert ahead == [1, 1, 1, 0]
