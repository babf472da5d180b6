"""States of an optimizer on two ranks, put together and divided again."""

import pytest
import torch
from torch import distributed, nn

from lightning_align.offload.block import Block
from lightning_align.offload.ranks import Ranks
from lightning_align.offload.whole_states import gather_states, keep_own_states
from tests.helpers.ranks import run_ranks

SHAPES = {"a": (40, 50), "b": (7,), "c": (30, 40), "d": (3,)}


def states_of(block):
    generator = torch.Generator().manual_seed(1)
    whole = {}
    for name in SHAPES:
        moments = torch.randn(2, *SHAPES[name], generator=generator)
        whole[name] = {"step": torch.tensor(3.0), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
    del whole["d"]  # was never stepped
    return {block.parameters[name]: dict(state) for name, state in whole.items()}


@pytest.mark.parametrize("whole", [False, True])
def test_states_that_are_divided_come_together_again(whole):
    def run(rank):
        ranks = Ranks(distributed.new_group())
        block = Block("block", {n: nn.Parameter(torch.zeros(s)) for n, s in SHAPES.items()})
        block.divide(rank, 2, whole=whole)
        expected, own = states_of(block), states_of(block)
        keep_own_states(block, own)
        sizes = {id(p): [v.numel() for v in state.values()] for p, state in own.items()}
        for name, piece in block.pieces.items():
            numel = torch.Size(piece.place.shape).numel()
            assert sizes.get(id(block.parameters[name]), [1, numel, numel]) == [1, numel, numel]
        assert len(own) == len(block.pieces.keys() - {"d"})
        found = gather_states(ranks, block, own)
        if rank:
            return found == {}
        assert found.keys() == expected.keys()
        return all(
            torch.equal(found[p][key], value)
            for p, state in expected.items()
            for key, value in state.items()
        )

    assert run_ranks(run) == [True, True]
