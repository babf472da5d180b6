"""Values in memory that are read and written like a file, and looked at without a copy."""

import torch

from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import DirectFile, Threads
from lightning_align.offload.memory_file import MemoryFile


def test_what_is_written_is_read_and_seen():
    file = MemoryFile(8192)
    written = torch.arange(8192).to(torch.uint8)
    file.allocate(8192)
    file.write(written[:4096], 4096).wait()
    file.write(written[4096:], 0).wait()
    written[0] = 9  # a copy, not the memory that was given
    found = torch.empty(8192, dtype=torch.uint8)
    file.read(found, 0).wait()
    file.sync().wait()
    assert torch.equal(found, file.view(0, 8192))
    assert found[4096] == 0
    seen = file.view(4096, 4096)
    seen.fill_(3)
    file.write(seen, 4096).wait()  # it is there already
    assert (file.view(4096, 4096) == 3).all()
    file.close()
    assert (seen == 3).all()


def test_what_lies_behind_is_in_a_file(tmp_path):
    threads = Threads()
    file = MemoryFile(8192, DirectFile(tmp_path / "states", threads))
    file.allocate(8192 + 4096)
    assert (tmp_path / "states").stat().st_size == 4096
    memory = BufferPool().take(4096)
    file.write(memory.fill_(7), 8192).wait()
    file.sync().wait()
    file.read(memory.zero_(), 8192).wait()
    assert (memory == 7).all()
    assert (tmp_path / "states").read_bytes() == bytes([7]) * 4096
    file.close()
    threads.close()
