"""Memory that was freed and that glibc keeps for later."""

import gc
import subprocess
import sys

import pytest
import torch

from lightning_align._compat.glibc_memory import give_back_freed
from tests.helpers.children import in_child


def resident_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_below_what_is_used_goes_back() -> None:
    def run() -> None:
        tensors = [torch.ones(1 << 14) for _ in range(2000)]  # 64 KB each: in the heap
        last = torch.ones(1 << 14)
        before = resident_bytes()
        del tensors[1:]
        gc.collect()
        give_back_freed()
        assert before - resident_bytes() > 100 << 20
        assert last.sum() == 1 << 14

    assert in_child(run) == 0


LARGE = """
import gc, torch
from lightning_align._compat import glibc_memory
from tests._compat.test_glibc_memory import resident_bytes

assert glibc_memory.mapped_from() == 32 << 20
glibc_memory.map_large_allocations()
assert glibc_memory.mapped_from() == 256 << 10
for _ in range(3):
    tensors = [torch.ones(1 << 16) for _ in range(800)]  # 256 KiB each
    last, before = torch.ones(1 << 16), resident_bytes()
    del tensors
    gc.collect()
    print((before - resident_bytes()) >> 20)
    assert last.sum() == 1 << 16
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_what_is_large_goes_back_when_it_is_freed() -> None:
    """In a process of its own: where others have left holes in the heap, they are filled first."""
    run = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    freed = [int(line) for line in run.stdout.split()]
    assert len(freed) == 3
    assert min(freed) > 190
