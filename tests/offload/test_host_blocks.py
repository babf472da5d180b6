"""Where host memory computes, the same questions are asked, and nothing is copied."""

import torch
from torch import nn

from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.device_blocks import Departures, DeviceBlocks
from lightning_align.offload.host_blocks import HostBlocks


def block_of(ranks=1):
    block = Block("block", {"a": nn.Parameter(torch.ones(5000))})
    block.divide(0, ranks)
    block.memory = BufferPool().take(block.nbytes)
    block.copy_into(block.memory)
    return block


def test_it_is_asked_what_a_device_is_asked():
    ours, theirs = ({n for n in vars(kind) if n[0] != "_"} for kind in (HostBlocks, DeviceBlocks))
    assert ours == theirs | {"device"}


def test_parameters_are_in_the_only_memory_there_is():
    host, block = HostBlocks(), block_of()
    host.admit(block)
    assert host.bring(block) is block.seen is block.memory
    assert block.parameters["a"].data_ptr() == block.memory.data_ptr()
    with torch.no_grad():
        block.parameters["a"].fill_(2)
    host.take_back(block)
    host.leave(block)
    assert (block.places["a"].of(block.memory) == 2).all()
    assert (block.parameters["a"] == 2).all()


def test_behind_an_update_of_pieces_parameters_are_whole():
    host, block = HostBlocks(), block_of(ranks=2)
    host.admit(block)
    block.show_section(block.memory[block.section])
    assert block.parameters["a"].numel() < 5000
    host.updated(block)
    assert block.parameters["a"].numel() == 5000


def test_gradients_are_taken_up_at_once():
    block, came = block_of(), []
    HostBlocks().admit(block)
    block.parameters["a"].grad = torch.ones(5000)
    departures = Departures(HostBlocks(), lambda *arrived: came.append(arrived))
    departures.take(block)
    assert came == [(block, None)]
    assert (block.parameters["a"].grad == 1).all()
    assert not block.users
