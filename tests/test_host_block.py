"""Memory of snapshots and a process that was forked: not inherited, and not freed by it."""

import gc
import mmap
import os

import pytest
import torch

from lightning_align.checkpointing.snapshot import HostBuffer
from lightning_align.host_block import HostBlock


def test_a_forked_process_does_not_inherit_the_buffer() -> None:
    """Else every page would be copied on the first write after a DataLoader started its workers."""
    if not hasattr(os, "fork") or not os.path.exists("/proc/self/smaps"):
        pytest.skip("needs Linux")
    buffer = HostBuffer()
    buffer.copy([torch.ones(100)])
    assert buffer.block is not None
    address = buffer.block.bytes.data_ptr()

    def mapped(pid: int | str) -> bool:
        with open(f"/proc/{pid}/maps") as file:
            ranges = [line.split()[0].split("-") for line in file]
        # The kernel makes one mapping of neighbours that are alike.
        return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(reader, 1)
        os._exit(0)
    try:
        assert mapped("self")
        assert not mapped(pid)
    finally:
        os.write(writer, b"x")
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)


def test_freeing_an_inherited_buffer_unmaps_nothing_of_the_forked_process() -> None:
    """Its memory is a hole in the fork, which the fork's own allocations fill."""
    buffer = HostBuffer()
    buffer.copy([torch.ones(2**20)])
    assert buffer.block is not None
    begin, nbytes = buffer.block.bytes.data_ptr(), buffer.block.nbytes
    child = os.fork()
    if child == 0:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        filled = [mmap.mmap(-1, nbytes, flags=private) for _ in range(64)]
        tensors = [torch.frombuffer(memory, dtype=torch.uint8).fill_(1) for memory in filled]
        in_the_hole = any(begin <= tensor.data_ptr() < begin + nbytes for tensor in tensors)
        del buffer
        gc.collect()
        os._exit(int(all(tensor.all() for tensor in tensors)) + 2 * in_the_hole)
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status), f"the fork died of signal {os.WTERMSIG(status)}"
    assert os.WEXITSTATUS(status) == 3, "1: the hole was not filled, so that nothing was tried"


def test_a_part_of_the_block_is_a_storage_over_the_same_bytes() -> None:
    block = HostBlock(1, pinned=False)
    assert block.nbytes == mmap.PAGESIZE
    part = block.record(16, 8)
    assert (part.nbytes(), part.data_ptr()) == (8, block.bytes.data_ptr() + 16)
    block.bytes[16:24] = 7
    assert list(part) == [7] * 8
    assert block.record(16, 0).nbytes() == 0
