"""Where parameters of a block lie, and what they are while they are away."""

import pytest
import torch
from torch import nn

from lightning_align.offload.block import Block, placed
from lightning_align.offload.buffers import BufferPool


def test_parameters_are_padded_to_64_elements():
    places, nbytes = placed({"a": torch.zeros(3), "b": torch.zeros(65), "c": torch.zeros(2, 2)})
    assert [place.offset for place in places.values()] == [0, 256, 768]
    assert nbytes == 4096


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
