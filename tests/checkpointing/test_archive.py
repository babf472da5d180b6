import io
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from lightning_align.checkpointing.archive import (
    ALIGNMENT,
    Archive,
    Leaf,
    Reduced,
    ending,
    reduce_ex,
    storage_key,
)
from lightning_align.checkpointing.frozen import freeze
from lightning_align.checkpointing.snapshot import HostBuffer


def file_of(state: Any) -> bytes:
    buffer = HostBuffer()
    structure, tensors = freeze(state)
    buffer.copy(tensors)
    return b"".join(bytes(part) for part in buffer.file(structure))


def test_the_file_is_one_that_torch_load_reads() -> None:
    state = {"weight": torch.randn(3, 5), "step": 7, "names": ["a", ("b", None)]}

    loaded = torch.load(io.BytesIO(file_of(state)), weights_only=True)

    assert torch.equal(loaded["weight"], state["weight"])
    assert loaded["step"] == 7
    assert loaded["names"] == ["a", ("b", None)]


def test_a_memory_map_reads_aligned_storages(tmp_path: Path) -> None:
    state = {f"tensor{i}": torch.randn(i) for i in range(1, 9)}
    (tmp_path / "a.ckpt").write_bytes(file_of(state))

    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True, mmap=True)

    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].data_ptr() % ALIGNMENT == 0


def test_the_pickle_says_what_that_of_torch_save_says() -> None:
    """Everything but the names of the records; so whoever reads torch.save's files reads ours."""
    state = {"a": torch.randn(4, 3).t(), "b": torch.nn.Parameter(torch.ones(2)), "c": (1, "x")}
    theirs = io.BytesIO()
    torch.save(state, theirs)

    def read(data: bytes) -> tuple[bytes, set[str]]:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            names = {name.split("/", 1)[1] for name in file.namelist()}
            root = file.namelist()[0].split("/", 1)[0]
            return file.read(f"{root}/data.pkl"), names

    our_pickle, our_names = read(file_of(state))
    their_pickle, their_names = read(theirs.getvalue())

    assert our_pickle == their_pickle
    assert our_names <= their_names


def test_records_beyond_4_gib(tmp_path: Path) -> None:
    """A file of holes: a record of 5 GiB, and one that begins behind it."""
    layout, sizes, leaves = Archive(), [5 << 30, 12], []
    with open(tmp_path / "a.ckpt", "wb") as file:
        for number, size in enumerate(sizes):
            file.seek(layout.end)
            file.write(layout.add(f"data/{number}", size))
            view = torch.empty(0)
            function, (storage, *_) = reduce_ex(view)
            key = storage_key(storage, number, size)
            leaves.append(Reduced((function, (key, 0, (3,), (1,), False, OrderedDict()))))
        file.seek(layout.end - 12)
        file.write(struct.pack("<3f", 1, 2, 3))
        for part in ending([Leaf(0), Leaf(1)], leaves, layout):
            file.write(part)

    first, second = torch.load(tmp_path / "a.ckpt", weights_only=True, mmap=True)

    assert first.untyped_storage().nbytes() == 5 << 30
    assert second.tolist() == [1, 2, 3]


def test_more_records_than_16_bits_count() -> None:
    layout, file = Archive(), io.BytesIO()
    for number in range(66_000):
        file.write(layout.add(f"data/{number}", 0))
    file.write(layout.directory())

    with zipfile.ZipFile(file) as archive:
        assert len(archive.namelist()) == 66_000
        assert archive.read("archive/data/65999") == b""


def test_tensors_inside_of_other_objects_are_saved_too() -> None:
    """An object that we cannot look into is copied whole, and pickled as torch.save would."""
    state = {"set": torch.Size([1, 2]), "sparse": torch.eye(3).to_sparse(), "a": torch.ones(2)}

    loaded = torch.load(io.BytesIO(file_of(state)), weights_only=True)

    assert loaded["set"] == torch.Size([1, 2])
    assert torch.equal(loaded["sparse"].to_dense(), torch.eye(3))
