"""Which parameters come and go together, and which stay."""

import pytest
import torch
from torch import nn

from lightning_align.strategies.zero_infinity.blocks import find_blocks
from tests.helpers.offloaded import Regression


def test_a_policy_chooses_blocks():
    module = Regression()
    for policy in (["torch.nn.modules.activation.Tanh"], lambda part: False):
        with pytest.raises(ValueError, match="must choose at least one module"):
            find_blocks(module, policy)
    blocks, modules = find_blocks(module, [nn.Linear])
    assert list(modules)[:2] == ["inlet", "parts.0.0"]
    assert [block.name for block in blocks if block.kept] == ["rest"]
    assert list(blocks[-1].parameters) == ["norm.weight", "norm.bias"]
    for name in ("torch.nn.modules.linear.Linear", "Linear"):
        assert list(find_blocks(module, [name])[1]) == list(modules)
    assert list(find_blocks(module, lambda part: part is module.parts[1])[1]) == ["parts.1"]


def test_tied_parameters_stay():
    blocks, _ = find_blocks(nn.Sequential(part := nn.Linear(3, 3), nn.Linear(3, 4), part), None)
    assert {block.name: list(block.parameters) for block in blocks} == {
        "0": ["0.weight", "0.bias"],  # one module, called twice
        "1": ["1.weight", "1.bias"],
    }
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    blocks, _ = find_blocks(tied, None)
    assert {block.name: list(block.parameters) for block in blocks} == {
        "0": ["0.bias"],
        "1": ["1.bias"],
        "rest": ["0.weight"],
    }


def test_parameters_that_cannot_be_away_are_refused():
    module = Regression()
    module.inlet.bias = nn.Parameter(torch.zeros(20, dtype=torch.int32), requires_grad=False)
    with pytest.raises(ValueError, match=r"floating-point parameters, and 'inlet\.bias'"):
        find_blocks(module, None)
    with pytest.raises(ValueError, match="is on the meta device"):
        find_blocks(nn.Linear(2, 2, device="meta"), None)
