"""Sums of a window: added up as autograd adds them, and edited when they are read."""

import pytest
import torch
from torch import nn

from lightning_align.offload.block import Block
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import Threads
from lightning_align.offload.gradients import GradientSums


@pytest.mark.parametrize("on_disk", [True, False])
def test_sums_are_those_of_autograd(tmp_path, on_disk):
    block = Block("block", {"a": nn.Parameter(torch.zeros(5)), "b": nn.Parameter(torch.zeros(3))})
    sums = GradientSums([tmp_path] if on_disk else None, [block], BufferPool(), Threads())
    parts = [torch.full((5,), 0.1), torch.full((5,), 0.2), torch.full((5,), 0.7)]
    expected = parts[0].clone()
    for number, part in enumerate(parts):
        if number:
            expected += part
        block.parameters["a"].grad = part.clone()
        if number == 2:  # one that comes late
            block.parameters["b"].grad = torch.ones(3)
        sums.add(block)
        assert block.parameters["a"].grad is None
    assert sums.names(block) == {"a", "b"}
    found = block.places["a"].of(sums.take(block))
    assert torch.equal(found, expected)
    assert torch.equal(sums.norms[block.parameters["a"]], torch.linalg.vector_norm(expected))
    sums.edits += [lambda gradient: gradient.mul_(3), lambda gradient: gradient.clamp_(max=2)]
    assert torch.equal(sums.edit(found), (expected * 3).clamp(max=2))
    sums.clear()
    assert not sums.names(block)
    assert not sums.edits
    sums.close()


def test_a_factor_comes_behind_the_sum(tmp_path):
    block = Block("block", {"a": nn.Parameter(torch.zeros(5))})
    sums = GradientSums([tmp_path], [block], BufferPool(), Threads())
    for factor in (None, 0.25):
        block.parameters["a"].grad = torch.full((5,), 2.0)
        sums.add(block, factor=factor)
    assert torch.equal(block.places["a"].of(sums.take(block)), torch.ones(5))
    assert sums.norms[block.parameters["a"]] == pytest.approx(5**0.5)
    sums.close()
