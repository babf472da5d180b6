"""Blocks on disk: an update is there as a whole or not at all, and a record says which."""

import errno
import os

import pytest
import torch
from torch import nn

from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import Threads
from lightning_align.offload.store import ShardStore, sweep


def blocks():
    return [
        Block(
            f"block {number}",
            {"weight": nn.Parameter(torch.zeros(70)), "bias": nn.Parameter(torch.zeros(3))},
        )
        for number in range(2)
    ]


def store_in(folder, **arguments):
    return ShardStore(folder, blocks(), Threads(), **arguments)


def put(store, name, value):
    memory = BufferPool().take(store.blocks[name].nbytes).fill_(value)
    store.settle(name)
    store.write(name, memory)
    store.update_done(name)


def get(store, name):
    memory = BufferPool().take(store.blocks[name].nbytes)
    store.read(name, memory).wait()
    assert memory.min() == memory.max()
    return int(memory[0])


def test_what_is_not_committed_is_lost_and_what_is_stays(tmp_path):
    store = store_in(tmp_path)
    put(store, "block 0", 1)
    put(store, "block 1", 1)
    assert store.recover() is None
    store.commit(1, b"one")
    put(store, "block 0", 2)
    put(store, "block 0", 3)  # a second time before a commit
    assert get(store, "block 0") == 3
    store.close()
    store = store_in(tmp_path)
    record = store.recover()
    assert (record.step, record.payload) == (1, b"one")
    assert [get(store, name) for name in store.blocks] == [1, 1]
    put(store, "block 0", 4)
    store.commit(2, b"two")
    put(store, "block 0", 5)
    store.close()
    store = store_in(tmp_path)
    assert store.recover().step == 2
    assert [get(store, name) for name in store.blocks] == [4, 1]  # the second was never written


def test_without_two_files_the_committed_one_is_overwritten(tmp_path):
    store = store_in(tmp_path, atomic_step=False)
    store.allocate({})
    put(store, "block 0", 1)
    store.commit(1, b"")
    put(store, "block 0", 2)
    store.close()
    store = store_in(tmp_path, atomic_step=False)
    assert store.recover().step == 1
    assert get(store, "block 0") == 2


def test_a_state_stays_where_it_fits_and_moves_to_the_end_where_it_does_not(tmp_path):
    store = store_in(tmp_path)
    name, begin = "block 0", store.blocks["block 0"].nbytes
    first = store.place_state(name, "weight", 5000)
    store.states[name]["weight"] = first
    second = store.place_state(name, "bias", 100)
    store.states[name]["bias"] = second
    assert (first.offset, first.capacity) == (begin, 8192)
    assert (second.offset, second.capacity) == (begin + 8192, 4096)
    assert store.place_state(name, "weight", 8000).offset == begin
    assert store.place_state(name, "weight", 9000).offset == begin + 12288


def test_room_is_reserved_once(tmp_path):
    """A state that is stored has its place in what is expected."""
    store = store_in(tmp_path)
    name = "block 0"
    for _ in range(2):
        store.allocate({name: 8000})
        place = store.place_state(name, "weight", 5000)
        store.states[name]["weight"] = place
        assert (tmp_path / "00000.0.block").stat().st_size == 4096 + 8192


def test_a_file_that_is_shorter_than_its_record_says_is_refused(tmp_path):
    """Reserving room for a step would fill it up with zeros."""
    store = store_in(tmp_path)
    put(store, "block 0", 1)
    put(store, "block 1", 1)
    store.commit(3, b"")
    store.close()
    os.truncate(tmp_path / "00001.0.block", 2048)
    with pytest.raises(
        ValueError, match=r"00001\.0\.block is damaged: it has 2,048 of 4,096 bytes"
    ):
        store_in(tmp_path).recover()


def test_a_record_of_other_blocks_is_refused(tmp_path):
    store = store_in(tmp_path)
    store.allocate({})
    store.commit(3, b"")
    other = ShardStore(tmp_path, blocks()[:1], Threads())
    with pytest.raises(ValueError, match="of step 3 of another model"):
        other.recover()


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    store = store_in(tmp_path)
    store.commit(3, b"")
    (tmp_path / "notes.txt").write_text("mine")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("atomic", [True, False])
def test_a_linked_file_is_never_written_again(tmp_path, atomic):
    """Not by this process, nor by one that finds the link when it opens the folder."""
    (tmp_path / "store").mkdir()
    store = store_in(tmp_path / "store", atomic_step=atomic)
    value = 0

    def step():
        nonlocal value
        value += 1
        for name in store.blocks:
            put(store, name, value)
        store.commit(value, b"")

    step()
    held = {}
    for number in range(3):
        for file in store.current:
            link = tmp_path / f"{number} {file.path.name}"
            store.make_durable()
            file.link(link)
            held[link] = link.read_bytes()
        step()
        step()
        store.close()
        store = store_in(tmp_path / "store", atomic_step=atomic)
        assert store.recover().step == value
        assert [get(store, name) for name in store.blocks] == [value] * 2
        step()
    assert len(held) == 6
    assert all(link.read_bytes() == content for link, content in held.items())
    assert not list((tmp_path / "store").glob("*fresh*"))


@pytest.mark.parametrize("atomic", [True, False])
def test_what_is_shown_stays_and_takes_no_more_files_once_it_is_gone(tmp_path, atomic):
    store = store_in(tmp_path, atomic_step=atomic)
    put(store, "block 0", 1)
    store.commit(1, b"")
    shown = store.values("block 0")
    for step in (2, 3, 4):
        put(store, "block 0", step)
        store.commit(step, b"")
    assert set(shown.tolist()) == {1}
    assert get(store, "block 0") == 4
    del shown
    inodes = {path.stat().st_ino for path in tmp_path.glob("00000.*")}
    for step in (5, 6):
        put(store, "block 0", step)
        store.commit(step, b"")
    assert {path.stat().st_ino for path in tmp_path.glob("00000.*")} == inodes


def test_a_held_block_takes_its_states_along(tmp_path):
    """Also where a step is written in place: the new file has nothing yet."""
    store = store_in(tmp_path, atomic_step=False)
    put(store, "block 0", 1)
    assert not store.moves("block 0")
    shown = store.values("block 0")
    assert store.moves("block 0")
    assert len(shown)


def test_leftovers_of_a_new_file_are_swept(tmp_path):
    store_in(tmp_path).close()
    (tmp_path / "00000.fresh.block").touch()
    store_in(tmp_path).close()
    assert not list(tmp_path.glob("*fresh*"))


def test_a_file_on_another_filesystem_is_copied(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    put(store, "block 0", 7)
    store.make_durable()

    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    file = next(file for file in store.current if file.path.name == "00000.0.block")
    file.link(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == file.path.read_bytes()
    assert not file.is_held
