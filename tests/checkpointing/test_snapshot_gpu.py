"""The CUDA path: registered memory and a stream beside training. Its twin is test_snapshot.py."""

import io
from pathlib import Path

import pytest
import torch

from lightning_align.checkpointing import SnapshotEngine
from lightning_align.checkpointing.frozen import freeze, thaw
from lightning_align.checkpointing.snapshot import HostBuffer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def test_tensors_of_a_gpu_round_trip_as_tensors_of_the_cpu() -> None:
    base = torch.randn(300, 200, device="cuda")
    state = {
        "whole": torch.randn(1000, 1000, device="cuda"),
        "tied": [base, base.t(), base[10:20]],
        "scalar": torch.tensor(3.0),
        "conjugate": torch.randn(5, dtype=torch.complex64, device="cuda").conj(),
    }
    buffer = HostBuffer()
    structure, tensors = freeze(state)
    buffer.copy(tensors, state)
    file = io.BytesIO(b"".join(bytes(part) for part in buffer.file(structure)))

    for kept in (thaw(structure, buffer), torch.load(file, weights_only=True)):
        assert torch.equal(kept["whole"], state["whole"].cpu())
        assert torch.equal(kept["conjugate"], state["conjugate"].cpu())
        for ours, theirs in zip(kept["tied"], state["tied"], strict=True):
            assert torch.equal(ours, theirs.cpu())
        assert len({tensor.untyped_storage().data_ptr() for tensor in kept["tied"]}) == 1


def test_training_queues_behind_the_copy(tmp_path: Path) -> None:
    """The weights change right after save() returns, on the GPU, while copies are under way."""
    weight = torch.ones(64 << 20, device="cuda")
    with SnapshotEngine(tmp_path) as engine:
        for step in range(1, 6):
            engine.save({"weight": weight}, f"step{step}", step)
            weight.add_(1)
            assert bool((engine.load(f"step{step}")["weight"] == step).all())
