"""Copies in a file without a name."""

import gc
import os

import pytest
import torch

from lightning_align.mapped import source_of
from lightning_align.offload import set_aside as module
from lightning_align.offload.files import Threads
from lightning_align.offload.set_aside import set_aside


@pytest.mark.parametrize("piece", [4096, 4 << 20])
def test_copies_are_what_they_were_made_of(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(module, "_PIECE", piece)
    rows = torch.randn(300, 7)
    tensors = [
        [rows.clone()],
        list(rows.clone().split([1, 200, 99])),
        [torch.randn(40, 30).t()],
        [torch.randn(5).bfloat16()],
        [torch.tensor(3.0, dtype=torch.float64)],
        [torch.empty(0, 3)],
    ]
    expected = [torch.cat(parts) if len(parts) > 1 else parts[0].clone() for parts in tensors]
    copies = set_aside(tensors, tmp_path, Threads(1))
    for parts in tensors:
        for part in parts:
            part.fill_(-1)
    assert all(map(torch.equal, copies, expected))
    assert [copy.dtype for copy in copies] == [value.dtype for value in expected]
    assert torch.equal(copies[1], rows)
    assert all(source_of(copy) for copy in copies[:-1])


def test_nothing_is_left_of_the_file(tmp_path):
    gc.collect()  # what other tests have left
    before = len(os.listdir("/dev/fd"))
    threads = Threads(1)
    copies = set_aside([[torch.ones(10_000)]], tmp_path, threads)
    assert not list(tmp_path.iterdir())
    del copies
    gc.collect()
    assert len(os.listdir("/dev/fd")) == before
    with pytest.raises(OSError, match="none"):
        set_aside([[torch.ones(3)]], tmp_path / "none", threads)
    threads.close()


def test_without_a_folder_they_are_in_memory():
    parts = [torch.ones(2, 3), torch.zeros(1, 3)]
    (copy,) = set_aside([parts], None, Threads(1))
    assert torch.equal(copy, torch.cat(parts))
    assert source_of(copy) is None
