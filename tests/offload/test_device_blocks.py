"""Copies of blocks on a device, and gradients that come back one block late."""

import pytest
import torch
from torch import nn

from lightning_align.offload.away import Away
from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.device_blocks import Departures, DeviceBlocks
from tests.helpers.stand_in_device import DelayedCopies


@pytest.fixture
def device():
    return DeviceBlocks(DelayedCopies(), BufferPool())


def block_of(name="block", value=1.0, stays=False):
    parameters = {"a": nn.Parameter(torch.full((5,), value)), "b": nn.Parameter(torch.zeros(3))}
    block = Block(name, parameters, kept=stays)
    block.memory = BufferPool().take(block.nbytes)
    block.copy_into(block.memory)
    return block


def test_parameters_are_in_the_copy_and_the_host_has_the_values(device):
    block = block_of()
    device.admit(block)
    assert isinstance(block.parameters["a"], Away)
    there = device.bring(block)
    assert block.seen is there is block.there
    assert there.data_ptr() != block.memory.data_ptr()
    assert (block.parameters["a"] == 1).all()
    assert device.bring(block) is there
    device.leave(block)
    assert isinstance(block.parameters["a"], Away)
    assert (block.places["a"].of(block.memory) == 1).all()


def test_what_stays_gets_updates_in_place_and_gives_edits_back(device):
    block = block_of(stays=True)
    device.admit(block)
    place = block.parameters["a"].data_ptr()
    block.show_section(block.memory)
    device.settle(block)
    with torch.no_grad():
        block.parameters["a"].fill_(2)
    device.updated(block)
    assert block.parameters["a"].data_ptr() == place
    assert (block.parameters["a"] == 2).all()
    assert not block.is_edited
    with torch.no_grad():
        block.parameters["a"].fill_(3)
    assert block.is_edited
    device.take_back(block)
    assert (block.places["a"].of(block.memory) == 3).all()
    assert not block.is_edited


def test_host_memory_that_is_copied_from_is_not_given_back(device):
    block = block_of()
    device.admit(block)
    device.bring(block)
    device.leave(block)
    block.memory = None
    device.copies.check()
    device.settle_all()


def test_gradients_come_when_those_of_the_next_block_do(device):
    blocks, came = [block_of(str(number)) for number in range(3)], []

    def arrived(block, gradients):
        came.append((block.name, {n: float(g.sum()) for n, g in gradients.gradients.items()}))

    departures = Departures(device, arrived)
    for number, block in enumerate(blocks):
        device.admit(block)
        device.bring(block)
        block.parameters["a"].grad = torch.full((5,), float(number))
        departures.take(block)
        assert block.parameters["a"].grad is None
        assert len(came) == number
        assert [block.users for block in blocks] == [int(n == number) for n in range(3)]
    departures.finish()
    assert came == [("0", {"a": 0}), ("1", {"a": 5}), ("2", {"a": 10})]
    assert not any(block.users for block in blocks)


def test_what_is_under_way_is_dropped_where_backward_has_failed(device):
    block = block_of()
    device.admit(block)
    device.bring(block)
    block.parameters["a"].grad = torch.ones(5)
    departures = Departures(device, lambda *_: pytest.fail("came"))
    departures.take(block)
    departures.drop()
    departures.finish()
    assert not block.users
