"""A Linear in tiles against the same in one piece."""

import copy

import pytest
import torch
from torch import nn

from lightning_align.offload.block import Block
from lightning_align.offload.tiles import (
    tile,
    tiled_optimizer_state,
    whole_optimizer_state,
    whole_values,
)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 30)
        self.second = nn.Linear(30, 8, bias=False)
        self.small = nn.Linear(8, 2)

    def forward(self, x):
        return self.small(self.second(torch.tanh(self.first(x))))


def cut(module, tile_numel=50, kept=False):
    block = Block("m", {f"m.{n}": p for n, p in module.named_parameters()}, kept=kept)
    return tile([block], {} if kept else {"m": module}, tile_numel)


def test_tiles_are_blocks_of_at_most_so_many_elements():
    module = Layers()
    blocks, modules, tiled = cut(module)
    assert [each.name for each in tiled] == ["m.first.weight", "m.second.weight"]
    assert [len(each.tiles) for each in tiled] == [5, 8]  # of 6 rows, and of 1
    tiles = [block for block in blocks if block.name != "m"]
    assert all(p.numel() <= 50 for block in tiles for p in block.parameters.values())
    assert list(blocks[0].parameters) == ["m.first.bias", "m.small.weight", "m.small.bias"]
    assert {block.name for block in blocks} == modules.keys()
    assert list(tiled[0].tiles) == [
        n for n, _ in module.named_parameters("m") if "first.weight_t" in n
    ]


def test_forward_and_gradients_are_those_of_one_piece():
    theirs, ours = Layers().double(), Layers().double()
    _, _, tiled = cut(ours)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [module(x) for module, x in zip((theirs, ours), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-13, atol=1e-13)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-13, atol=1e-13)
    for each in tiled:
        grad = torch.cat([p.grad for p in each.tiles.values()])
        whole = theirs.get_parameter(each.name.removeprefix("m.")).grad
        torch.testing.assert_close(grad, whole, rtol=1e-13, atol=1e-13)


def test_states_have_the_whole_weight():
    theirs, ours = Layers(), Layers()
    cut(ours)
    expected = theirs.state_dict()
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        theirs.first.weight.mul_(2)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state_dict()["first.weight"], theirs.first.weight)
    parts = {f"m.{n}": p for n, p in ours.state_dict(keep_vars=True).items()}
    _, _, tiled = cut(ours)  # what is cut stays cut
    assert torch.equal(whole_values(parts, tiled)["m.first.weight"], theirs.first.weight)


@pytest.mark.parametrize("named", [False, True])
def test_the_optimizer_has_its_state_in_the_place_that_it_has_without_tiles(named):
    theirs = Layers().double()
    ours = copy.deepcopy(theirs)
    _, _, tiled = cut(ours)
    optimizers = []
    for module in (theirs, ours):
        parts = [module.small, module.second, module.first]  # another order than of parameters
        of = [part.named_parameters() if named else part.parameters() for part in parts]
        groups = [{"params": list(each), "lr": 1 / n} for n, each in enumerate(of, 2)]
        optimizers.append(torch.optim.AdamW(groups, lr=0.1))
        module(torch.ones(2, 8, dtype=torch.float64)).sum().backward()
        optimizers[-1].step()
    expected = optimizers[0].state_dict()
    in_tiles = optimizers[1].state_dict()
    found = whole_optimizer_state(in_tiles, optimizers[1], tiled)
    torch.testing.assert_close(found["state"], expected["state"])
    assert found["param_groups"] == expected["param_groups"]
    again = tiled_optimizer_state(found, optimizers[1], tiled)
    torch.testing.assert_close(again["state"], in_tiles["state"])
    assert again["param_groups"] == in_tiles["param_groups"]
    optimizers[1].load_state_dict(again)


def test_what_stays_in_memory_is_not_cut():
    module = Layers()
    blocks, _, tiled = cut(module, kept=True)
    assert not tiled
    assert list(blocks[0].parameters) == [f"m.{n}" for n, _ in module.named_parameters()]


def test_code_that_asks_for_the_weight_gets_its_shape_and_is_told():
    module = Layers()
    cut(module)
    assert module.first.weight.shape == (30, 8)
    with pytest.raises(RuntimeError, match="weight of a layer in tiles was used"):
        module.first.weight.sum()
