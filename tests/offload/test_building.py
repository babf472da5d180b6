"""A module that is built with a few parameters in memory is the one that is built as ever."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lightning_align.offload.away import Away
from lightning_align.offload.building import Building
from tests.helpers.children import in_child
from tests.helpers.tiny_models import TINY_MODELS, PlainDecoder, TiedDecoder

WIDTH = 24


class NanoGPT(nn.Module):
    """Draws in one method of the whole, and once more into some, as nanoGPT does."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.wte.weight
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.startswith("layers.2"):
                nn.init.normal_(parameter, std=0.02 / len(self.layers) ** 0.5)
        self.layers[1].weight.data[3:5].uniform_(-1, 1)
        self.layers[1].bias.data = torch.randn(WIDTH)
        with torch.no_grad():
            self.layers[3].weight.copy_(self.layers[0].weight + self.layers[2].weight)

    def _init_weights(self, part):
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=0.02)


class Copied(nn.Module):
    """Copies of layers, a normalised weight, a dtype that is changed, and what holds on to data."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.again = copy.deepcopy(self.encoder.layers[1])
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        held = self.again.linear1.weight.data
        self.half = nn.Linear(WIDTH, WIDTH).bfloat16()
        self.count = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
        self.none = nn.Parameter(torch.empty(0))
        self.lstm = nn.LSTM(WIDTH, WIDTH)
        held.mul_(2)


MODULES = {
    **{name: TINY_MODELS[name] for name in ("llama", "llama_tied", "gpt2", "gemma2")},
    "plain": PlainDecoder,
    "tied": TiedDecoder,
    "nanogpt": NanoGPT,
    "copied": Copied,
}


def built(folder, make, budget=2000):
    torch.manual_seed(3)
    building = Building(folder, budget)
    with building.taking_over():
        module = make()
    return module, building


@pytest.mark.parametrize("name", MODULES)
def test_values_are_those_of_a_build_in_memory(tmp_path, name):
    torch.manual_seed(3)
    theirs = MODULES[name]()
    expected = torch.get_rng_state()
    module, building = built(tmp_path, MODULES[name])
    assert torch.equal(torch.get_rng_state(), expected)
    assert [*tmp_path.iterdir()] == []
    away = [p for p in module.parameters() if isinstance(p, Away)]
    assert len(away) >= len(list(module.parameters())) - 2  # integers, and nothing at all
    shared = lambda m: [n for n, _ in m.named_parameters(remove_duplicate=False)]  # noqa: E731
    assert shared(module) == shared(theirs)
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    state = module.state_dict()
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())
    building.close()


class Watched(Building):
    """Notes the most that was in memory."""

    most = 0

    def _make_room(self, *args, **kwargs):
        super()._make_room(*args, **kwargs)
        self.most = max(self.most, sum(self._here.values()))


def test_memory_holds_what_is_used_and_a_budget(tmp_path):
    building = Watched(tmp_path, 10_000)
    with building.taking_over():
        TINY_MODELS["gpt2"]()
        largest = max(building._here.values(), default=0)
    assert 0 < building.most <= 10_000 + max(largest, 30_000)
    assert not building._here


def test_a_view_stays_one(tmp_path):
    module, building = built(tmp_path, lambda: nn.Linear(30, 30))
    view = module.weight.data[3]
    building.bring([module.bias])
    building._make_room(0)
    assert not isinstance(module.weight, Away)
    view.fill_(7)
    del view
    building._make_room(0)
    assert isinstance(module.weight, Away)
    assert (module.weight[3] == 7).all()


def test_one_call_may_use_more_than_the_budget(tmp_path):
    module, _ = built(tmp_path, lambda: nn.ModuleList(nn.Linear(30, 30) for _ in range(9)), 1)
    weights = [part.weight for part in module]
    assert torch.stack(weights).isfinite().all()
    assert len(torch._foreach_norm(weights)) == 9


def test_what_is_forgotten_is_left_alone(tmp_path):
    module, building = built(tmp_path, partial(nn.Linear, 30, 30), 1)
    weight = module.weight.detach().clone()
    building.forget([module.weight])
    building._make_room(0)
    assert not isinstance(module.weight, Away)
    assert torch.equal(module.weight, weight)
    building.forget([module.bias])
    assert building.is_empty


def test_a_fork_reads_on(tmp_path):
    module, _ = built(tmp_path, partial(nn.Linear, 30, 30), 1)

    def read():
        assert module.weight.isfinite().all()

    assert in_child(read) == 0
    read()


def test_a_parameter_without_values_gets_them(tmp_path):
    building = Building(tmp_path, 1)
    parameter = building.empty_like(nn.Parameter(torch.empty(3, 5, device="meta")))
    assert isinstance(parameter, Away)
    assert parameter.isnan().all()
    nn.init.ones_(parameter)
    building._make_room(0)
    assert (parameter == 1).all()


def test_what_is_only_read_is_not_written_again(tmp_path):
    module, building = built(tmp_path, TINY_MODELS["llama"], 1)
    traffic = building._threads.traffic
    before, read = traffic.written, traffic.read
    module(torch.arange(4)[None])
    building._make_room(0)
    assert traffic.written == before
    assert traffic.read > read
    module.lm_head.weight.data.mul_(2)
    building._make_room(0)
    assert traffic.written >= before + module.lm_head.weight.numel() * 4
