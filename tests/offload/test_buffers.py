"""A buffer comes back when the last tensor that looks at it is gone, and no sooner."""

import gc

import pytest
import torch

from lightning_align.offload.buffers import BufferPool


def test_memory_is_used_again_once_nobody_looks_at_it():
    pool = BufferPool()
    first = pool.take(10_000)
    address = first.data_ptr()
    view = first[100:108].view(torch.float32)
    del first
    gc.collect()
    assert pool.take(10_000).data_ptr() != address  # the view holds it
    view.fill_(3.0)
    del view
    gc.collect()
    assert address in {pool.take(10_000).data_ptr(), pool.take(10_000).data_ptr()}


def test_memory_is_aligned_and_not_wasted_on_what_is_small():
    pool = BufferPool()
    large = pool.take(1 << 20)
    assert large.data_ptr() % 4096 == 0
    del large
    gc.collect()
    small = pool.take(4096)
    assert len(small) == 4096
    assert pool.allocated_bytes == (1 << 20) + 4096
    pool.trim()
    assert pool.allocated_bytes == 4096


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_buffers_may_be_registered_with_cuda():
    pool = BufferPool(pinned=True)
    memory = pool.take(1 << 20)
    assert memory.is_pinned()
    assert torch.equal(memory.to("cuda", non_blocking=True).cpu(), memory)
