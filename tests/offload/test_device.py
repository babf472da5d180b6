"""Copies to a device and back, in the order that events give."""

import pytest
import torch

from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.device import CudaCopies, copies_for
from tests.helpers.stand_in_device import DelayedCopies

NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def cuda(pinned=True):
    return CudaCopies(torch.device("cuda", torch.cuda.current_device()), pinned=pinned)


KINDS = [DelayedCopies, pytest.param(cuda, marks=NEEDS_CUDA)]


def test_on_a_cpu_there_is_nothing_to_copy():
    assert copies_for(torch.device("cpu"), pinned=True) is None


@pytest.mark.parametrize("kind", KINDS, ids=["stand-in", "CUDA"])
def test_what_goes_there_comes_back(kind):
    copies, pool = kind(), BufferPool(pinned=kind is cuda)
    memory = pool.take(4 << 20).view(torch.float32).normal_()
    back = pool.take(4 << 20).view(torch.float32)
    there, event = copies.to_device(memory)
    event.compute_waits()
    event = copies.to_host(there * 2, back)
    event.wait()
    assert event.is_done
    assert torch.equal(back, memory * 2)
    copies.to_device(back, there)[1].compute_waits()
    assert there.device == copies.device
    assert torch.equal(there.cpu(), back)
    copies.mark().wait()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_copy_into_memory_that_is_computed_with_waits_for_that():
    copies, pool = cuda(), BufferPool(pinned=True)
    ones = pool.take(64 << 20).view(torch.float32).fill_(1)
    zeros = pool.take(64 << 20).view(torch.float32).zero_()
    there, event = copies.to_device(ones)
    event.compute_waits()
    torch.cuda._sleep(100_000_000)  # cycles: what is copied next would be there long before
    total = there.sum()
    copies.to_device(zeros, there)[1].compute_waits()
    assert total == there.numel()
    assert there.sum() == 0
