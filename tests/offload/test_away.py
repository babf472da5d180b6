"""Whoever reads a value that is away is told, and what a parameter is may still be asked."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lightning_align.offload.away import come_back, go_away


def away(parameter):
    stand_in = torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
    go_away(parameter, "weight of block", stand_in)
    return parameter


@pytest.fixture
def module():
    module = nn.Linear(4, 3)
    away(module.weight)
    return module


READS = {
    "a norm": lambda p, m: p.norm(),
    "arithmetic": lambda p, m: 2 * p,
    "a comparison": lambda p, m: p == p,
    "an element": lambda p, m: p[0],
    "an average": lambda p, m: torch.zeros(3, 4).lerp_(p, 0.1),
    "a histogram": lambda p, m: torch.histc(p),
    "a list of them": lambda p, m: torch._foreach_norm([p]),
    "a vector of all": lambda p, m: nn.utils.parameters_to_vector(m.parameters()),
    "detach": lambda p, m: p.detach(),
    "data": lambda p, m: p.data,
    "numpy": lambda p, m: np.asarray(p),
    "memory": lambda p, m: p.data_ptr(),
    "state_dict": lambda p, m: m.state_dict(),
    "load_state_dict": lambda p, m: m.load_state_dict(nn.Linear(4, 3).state_dict()),
    "deepcopy": lambda p, m: copy.deepcopy(m),
    "pickle": lambda p, m: pickle.dumps(m),
    "torch.save": lambda p, m: torch.save(m, io.BytesIO()),
    "a forward": lambda p, m: m(torch.ones(4)),
    "another dtype": lambda p, m: m.double(),
    "other data": lambda p, m: setattr(p, "data", torch.zeros(3, 4)),
    "an edit": lambda p, m: nn.init.zeros_(p),
    "a step": lambda p, m: torch.optim.SGD([p], lr=1).step(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@torch.no_grad()
def test_reading_is_an_error(module, read):
    module.weight.grad = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match=r"weight of block was used while.*strategy\.gathered"):
        read(module.weight, module)


def test_what_it_is_may_be_asked(module):
    weight = module.weight
    assert (weight.shape, weight.dtype, weight.numel()) == ((3, 4), torch.float32, 12)
    assert (weight.device.type, weight.requires_grad, weight.is_leaf) == ("cpu", True, True)
    assert isinstance(weight, nn.Parameter)
    assert weight in {weight}
    assert list(module.state_dict(keep_vars=True)) == ["weight", "bias"]
    assert torch.zeros_like(weight).sum() == 0
    assert torch.zeros(12).double().to(weight).view_as(weight).dtype == torch.float32
    module.requires_grad_(False).requires_grad_(True).to("cpu").float()
    weight.register_hook(lambda gradient: gradient)
    optimizer = torch.optim.AdamW([weight])
    optimizer.load_state_dict(optimizer.state_dict())
    weight.grad = torch.ones(3, 4)
    assert nn.utils.clip_grad_norm_([weight], 1.0) == pytest.approx(12**0.5)
    optimizer.zero_grad()
    assert weight.grad is None
    assert "weight of block" in repr(weight)


class Special(nn.Parameter):
    """Of a library."""


@pytest.mark.parametrize("kind", [nn.Parameter, Special])
def test_it_comes_back_as_it_was(kind):
    parameter = kind(torch.zeros(3))
    before = dict(vars(parameter))
    for _ in range(2):  # it may go twice
        away(parameter)
    with pytest.raises(RuntimeError, match="weight of block"):
        parameter.sum()
    come_back(parameter, torch.ones(3))
    assert type(parameter) is kind
    assert vars(parameter) == before
    assert parameter.sum() == 3
