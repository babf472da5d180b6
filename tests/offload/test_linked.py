"""Checkpoints that are folders of links."""

import errno
import json
import os

import pytest
import torch
import xxhash
from torch import nn

from lightning_align.checkpointing.streamed import save_streamed
from lightning_align.mapped import part_of
from lightning_align.offload import linked
from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import Threads
from lightning_align.offload.store import ShardStore
from lightning_align.offload.striped import STRIPE


def store_of(folder, drives=(), numel=70):
    """A store of two blocks, and its checkpoint."""
    blocks = [
        Block(f"block {number}", {"weight": nn.Parameter(torch.randn(numel, 3))})
        for number in range(2)
    ]
    store = ShardStore(folder, blocks, Threads(), drives=drives)
    for block in blocks:
        memory = BufferPool().take(block.nbytes)
        block.copy_into(memory)
        store.write(block.name, memory)
        store.update_done(block.name)
    shown = [
        part_of(store.values(block.name), 0, block.places["weight"].shape, torch.float32)
        for block in blocks
    ]
    state = {"a": shown[0], "b": shown[1], "c": torch.arange(3.0)}
    return store, {"state_dict": state, "step": 4, "states": [{0: {"moment": shown[1]}}]}


def save(store, checkpoint, folder):
    folder.mkdir()
    store.make_durable()
    rest = linked.link(checkpoint, folder, 0, store.current)
    save_streamed(rest, folder / linked.META_FILE)


def read(folder):
    return linked.read(folder, "test", weights_only=True)


@pytest.fixture
def folder(tmp_path):
    store, checkpoint = store_of(tmp_path / "store")
    save(store, checkpoint, tmp_path / "saved")
    return tmp_path / "saved"


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert found["step"] == expected["step"]
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value)
    assert torch.equal(found["states"][0][0]["moment"], expected["states"][0][0]["moment"])


def test_what_is_read_is_what_was_written_and_nothing_was_copied(tmp_path):
    store, checkpoint = store_of(tmp_path / "store")
    save(store, checkpoint, tmp_path / "saved")
    assert linked.is_linked(tmp_path / "saved")
    assert_equal(read(tmp_path / "saved"), checkpoint)
    inodes = {file.path.stat().st_ino for file in store.current}
    blocks = list((tmp_path / "saved" / "rank00000").glob("*.block"))
    assert {path.stat().st_ino for path in blocks} == inodes


def test_files_striped_over_drives_are_linked_in_pieces(tmp_path):
    drives = [tmp_path / "second"]
    store, checkpoint = store_of(tmp_path / "first", drives, numel=STRIPE // 8)
    save(store, checkpoint, tmp_path / "saved")
    assert len(list((tmp_path / "saved" / "rank00000").glob("*.block"))) == 4
    assert_equal(read(tmp_path / "saved"), checkpoint)


def test_what_is_no_longer_current_is_not_linked(tmp_path):
    """It has lost its name to what was written since."""
    store, checkpoint = store_of(tmp_path / "store")
    store.commit(1, b"")
    memory = BufferPool().take(store.blocks["block 0"].nbytes).fill_(1)
    for step in (2, 3):
        store.write("block 0", memory)
        store.update_done("block 0")
        store.commit(step, b"")
    save(store, checkpoint, tmp_path / "saved")
    assert_equal(read(tmp_path / "saved"), checkpoint)
    assert len(list((tmp_path / "saved" / "rank00000").glob("*.block"))) == 1


def test_parts_of_several_ranks_are_put_together(folder):
    """Whatever their order and number."""
    whole = read(folder)["state_dict"]["a"].clone()
    index = edit(folder, lambda tensors: [each for each in tensors if each[0][1] != "a"])
    (entry,) = [each for each in index if each[0][1] == "a"]
    file, offset, start, count = entry[3][0]
    for rank, (begin, end) in enumerate(((100, count), (0, 7), (7, 100)), 1):
        other = folder / f"rank{rank:05d}"
        other.mkdir()
        piece = [file, offset + 4 * begin, start + begin, end - begin]
        write_index(other, {"format": 1, "files": {}, "tensors": [[*entry[:3], [piece]]]})
    assert torch.equal(read(folder)["state_dict"]["a"], whole)
    (folder / "rank00002" / linked.INDEX_FILE).unlink()
    with pytest.raises(ValueError, match="parts of 'a' are missing"):
        read(folder)


def write_index(folder, body):
    text = json.dumps(body).encode()
    digest = xxhash.xxh3_128_hexdigest(text).encode()
    (folder / linked.INDEX_FILE).write_bytes(digest + b"\n" + text)


def edit(folder, function):
    """Change the tensors of an index, and return them as they were."""
    path = folder / "rank00000" / linked.INDEX_FILE
    body = json.loads(path.read_bytes().partition(b"\n")[2])
    write_index(path.parent, {**body, "tensors": function(body["tensors"])})
    return body["tensors"]


def cut(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "rank00000/00001.block").unlink(), "00001.block is missing"),
        (lambda folder: cut(folder / "rank00000/00000.block"), "00000.block is missing or cut"),
        (lambda folder: cut(folder / "rank00000/index.json"), "index.json is damaged"),
        (lambda folder: (folder / "rank00000/index.json").unlink(), "no index.json"),
        (lambda folder: cut(folder / "meta.pt"), "no whole checkpoint"),
        (lambda folder: (folder / "meta.pt").unlink(), "meta.pt"),
    ],
)
def test_a_torn_folder_is_refused(folder, damage, match):
    damage(folder)
    with pytest.raises(ValueError, match=match):
        read(folder)


def test_all_of_a_folder_is_made_durable_and_an_error_is_raised(folder, monkeypatch):
    synced, fsync = [], os.fsync

    def note(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    linked.make_durable(folder)
    own = folder / "rank00000"
    paths = [folder, own, folder / linked.META_FILE, own / linked.INDEX_FILE]
    assert sorted(synced) == sorted(path.stat().st_ino for path in paths)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "disk")))
    with pytest.raises(OSError, match="disk"):
        linked.make_durable(folder)
