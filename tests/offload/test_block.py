"""Where parameters of a block lie, and what they are while they are away."""

import pytest
import torch
from torch import nn

from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool


def test_a_block_that_is_away_takes_no_memory_in_its_shape():
    weight = nn.Parameter(torch.zeros(70))
    block = Block("block", {"weight": weight})
    memory = BufferPool().take(block.nbytes).zero_()
    block.show(memory)
    assert weight.sum() == 0
    block.hide()
    assert weight.shape == (70,)
    with pytest.raises(RuntimeError, match="weight of block was used"):
        weight.isnan()
    with torch._C.DisableTorchFunctionSubclass():  # what compiled code gets
        assert weight.isnan().all()
        assert weight.untyped_storage().nbytes() == 4


SHAPES = {"a": (33, 20), "b": (7,), "c": (100, 3), "d": (2000,), "e": ()}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_pieces_of_all_ranks_are_the_block(count, whole):
    """Each element is in one piece; a piece begins at a multiple of 64, or is all of it."""
    kinds = {"b": torch.float64, "c": torch.bfloat16}
    values = {n: torch.randn(s).to(kinds.get(n, torch.float32)) for n, s in SHAPES.items()}
    block = Block("block", {name: nn.Parameter(value.clone()) for name, value in values.items()})
    block.divide(0, count, whole=whole)
    memory = BufferPool().take(block.nbytes)
    block.copy_into(memory)
    found = {name: [] for name in SHAPES}
    for rank in range(count):
        block.divide(rank, count, whole=whole, first=1)
        block.divide(rank, count, whole=whole)
        assert block.section_nbytes * count == block.nbytes
        assert block.section_nbytes % 4096 == 0
        for name, piece in block.pieces.items():
            part = piece.place.of(memory[block.section])
            assert torch.equal(part, piece.of_whole(values[name]))
            assert piece.start == sum(each.numel() for each in found[name])
            assert piece.start % 64 == 0
            found[name].append(part)
    for name, value in values.items():
        assert torch.equal(torch.cat([p.reshape(-1) for p in found[name]]).view(value.shape), value)
        assert not whole or len(found[name]) == 1


def test_whole_parameters_are_balanced():
    """Of 7 and 5 and 4 and 4 pages two ranks get 11 and 9; which gets more can be chosen."""
    sizes = {"a": 7, "b": 5, "c": 4, "d": 4}
    block = Block("block", {n: nn.Parameter(torch.zeros(1024 * s)) for n, s in sizes.items()})
    for first in (0, 1):
        loads = []
        for rank in range(2):
            block.divide(rank, 2, whole=True, first=first)
            loads.append(sorted(sizes[name] for name in block.pieces))
        assert loads == [[4, 7], [4, 5]][:: 1 - 2 * first]
    assert block.nbytes == 2 * 11 * 4096


def test_stretches_of_one_kind_of_number_cover_the_memory():
    block = Block(
        "block",
        {
            "a": nn.Parameter(torch.zeros(3000)),
            "b": nn.Parameter(torch.zeros(10, dtype=torch.bfloat16)),
            "c": nn.Parameter(torch.zeros(5)),
        },
    )
    block.divide(0, 2)
    assert block.nbytes == 2 * 8192
    kinds = [torch.float32, torch.bfloat16, torch.float32]
    parts = [slice(0, 12288), slice(12288, 12800), slice(12800, 16384)]
    assert list(block.stretches(slice(0, 16384))) == list(zip(kinds, parts, strict=True))
    parts[0] = slice(8192, 12288)
    assert list(block.stretches(slice(8192, 16384))) == list(zip(kinds, parts, strict=True))
    assert list(block.stretches(slice(0, 8192))) == [(torch.float32, slice(0, 8192))]
