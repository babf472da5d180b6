"""A file on several drives is one file: pieces alternate, and each drive has its share of room."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.offload import striped
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import DirectFile, Threads
from lightning_align.offload.striped import StripedFile, open_file

PAGE = 4096


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(striped, "STRIPE", 2 * PAGE)
    made = [tmp_path / str(number) for number in range(3)]
    for folder in made:
        folder.mkdir()
    return made


def counting(nbytes):
    return BufferPool().take(nbytes).copy_(torch.arange(nbytes) % 251)


def test_pieces_alternate_over_the_drives(folders):
    file = open_file(folders, "file", Threads())
    written = counting(7 * 2 * PAGE)
    file.write(written, 0).wait()
    file.sync().wait()
    pieces = [(folder / "file").read_bytes() for folder in folders]
    assert [len(piece) // (2 * PAGE) for piece in pieces] == [3, 2, 2]
    assert pieces[1][: 2 * PAGE] == bytes(written[2 * PAGE : 4 * PAGE].tolist())
    file.close()


@settings(max_examples=25, deadline=None)
@given(offset=st.integers(0, 9), length=st.integers(1, 9), count=st.integers(1, 3))
def test_what_is_written_anywhere_is_read(tmp_path_factory, offset, length, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(striped, "STRIPE", 2 * PAGE)
        root = tmp_path_factory.mktemp("drives")
        threads = Threads()
        file = StripedFile([root / str(number) for number in range(count)], threads)
        file.allocate(20 * PAGE)
        assert sum(path.stat().st_size for path in root.iterdir()) == 20 * PAGE
        whole, found = BufferPool().take(20 * PAGE).fill_(255), BufferPool().take(20 * PAGE)
        file.write(whole, 0).wait()
        begin, end = offset * PAGE, (offset + length) * PAGE
        whole[begin:end] = counting(end - begin)
        file.write(whole[begin:end], begin).wait()
        file.read(found, 0).wait()
        assert torch.equal(found, whole)
        found.zero_()
        file.read(found[begin:end], begin).wait()
        assert torch.equal(found[begin:end], whole[begin:end])
        file.close()
        threads.close()
        shutil.rmtree(root)


def test_one_folder_has_a_plain_file(tmp_path):
    file = open_file([tmp_path], "file", Threads())
    assert type(file) is DirectFile
    file.close()
