"""What comes next is read ahead, and what was used longest ago is given up."""

import pytest
import torch
from torch import nn

from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import DirectFile, Threads
from lightning_align.offload.prefetch import Residents
from lightning_align.offload.store import ShardStore


@pytest.fixture
def stored(tmp_path):
    blocks = [Block(str(n), {"p": nn.Parameter(torch.full((4,), float(n)))}) for n in range(5)]
    store = ShardStore(tmp_path, blocks, Threads())
    for block in blocks:
        memory = BufferPool().take(block.nbytes)
        block.copy_into(memory)
        store.write(block.name, memory)
        store.update_done(block.name)
        block.hide()
    return store, blocks


def present(blocks):
    return [block.name for block in blocks if block.memory is not None]


def test_a_second_pass_reads_ahead(stored, monkeypatch):
    store, blocks = stored
    residents = Residents(store, BufferPool(), 2)
    started = []
    read = DirectFile.read
    monkeypatch.setattr(
        DirectFile,
        "read",
        lambda file, *rest: started.append(file.path.name[4]) or read(file, *rest),
    )
    for block in blocks:
        residents.fetch(block, "forward")
        assert (block.parameters["p"] == float(block.name)).all()
    assert started == list("01234")
    assert present(blocks) == ["3", "4"]
    started.clear()
    residents.begin("forward")
    for block in blocks[:3]:
        residents.fetch(block, "forward")
    assert started == list("0123")  # the fourth before it is asked for
    residents.release_all()
    assert present(blocks) == []


def test_a_block_in_use_is_not_given_up_and_views_outlive_it(stored):
    store, blocks = stored
    residents = Residents(store, BufferPool(), 2)
    residents.fetch(blocks[0], "forward")
    blocks[0].users += 1
    for block in blocks[1:]:
        residents.fetch(block, "forward")
    assert present(blocks) == ["0", "4"]
    blocks[0].users -= 1
    view = blocks[0].parameters["p"].detach()[1:]
    for _ in range(3):
        for block in blocks[1:]:
            residents.fetch(block, "forward")
    assert "0" not in present(blocks)
    assert (view == 0).all()
