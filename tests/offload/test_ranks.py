"""What ranks send each other, and what they are told when they would wait for different things."""

import pytest
import torch
from torch import distributed, nn

from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.ranks import RankError, Ranks
from tests.helpers.ranks import end_of_ranks, run_ranks


def ranks_of_all():
    return Ranks(distributed.new_group())


def mixed_block(rank, size, whole=False):
    shapes = {"a": (33, 20), "b": (7,), "c": (100, 3), "d": (4000,)}
    kinds = {"b": torch.float64, "c": torch.bfloat16}
    block = Block(
        "block",
        {n: nn.Parameter(torch.zeros(s, dtype=kinds.get(n))) for n, s in shapes.items()},
    )
    block.divide(rank, size, whole=whole)
    return block


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_sections_are_gathered_and_means_are_scattered(size, whole):
    """Rank r has gradients r + 1: their mean is (size + 1) / 2."""

    def run(rank):
        ranks, block = ranks_of_all(), mixed_block(rank, size, whole)
        memory = BufferPool().take(block.nbytes).zero_()
        memory[block.section] = rank + 1
        ranks.gather("block", memory).result()
        found = [set(part.tolist()) for part in memory.chunk(size)]
        for place in block.places.values():
            place.of(memory).fill_(rank + 1)
        present = torch.tensor([1, 0, rank, 1])
        section = ranks.mean(block, memory, present).result()
        means = [piece.place.of(section) for piece in block.pieces.values()]
        means = {round(float(value), 2) for mean in means for value in mean.reshape(-1)}
        ranks.close()
        return found, present.tolist(), means

    for found, present, means in run_ranks(run, size):
        assert found == [{rank + 1} for rank in range(size)]
        assert present == [1, 0, size - 1, 1]
        assert means == {(size + 1) / 2}


def test_ranks_at_different_places_are_told():
    def run(rank):
        ranks = ranks_of_all()
        memory = torch.zeros(8192, dtype=torch.uint8)
        ranks.gather("both", memory).result()
        with pytest.raises(RankError, match=r"rank 0: the values of 0; rank 1: the values of 1"):
            ranks.gather(str(rank), memory).result()

    run_ranks(run)


def test_what_one_rank_cannot_do_fails_on_all():
    def run(rank):
        ranks = ranks_of_all()
        with ranks.together("first"):
            pass
        with ranks.together("second"):
            if rank == 1:
                raise OSError("no disk")

    ended = end_of_ranks(run)
    assert "OSError: no disk" in ended[1].error
    assert "RankError: rank 1 has failed; rank 0 was at: second" in ended[0].error
    assert not any(end.stuck for end in ended)


def test_who_waits_for_a_rank_that_has_failed_elsewhere_is_told():
    def run(rank):
        ranks = ranks_of_all()
        if rank == 1:
            ranks.leave(ValueError("elsewhere"), wait_s=30)
        ranks.sum("a number", torch.zeros(1))

    ended = end_of_ranks(run)
    assert "rank 1 has failed; rank 0 was at: a number" in ended[0].error
    assert "ValueError: elsewhere" in ended[1].error


def test_one_rank_sends_nothing():
    ranks = Ranks()
    numbers = torch.ones(3)
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.sum("", numbers) is ranks.of_one("", numbers) is numbers
    assert ranks.of_all("", "own") == ["own"]
    with pytest.raises(OSError, match="own"), ranks.together(""):
        raise OSError("own")
