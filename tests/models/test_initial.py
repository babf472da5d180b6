"""Initial weights do not depend on which parts of a model are there."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from lightning_align.models.initial import initialize
from lightning_align.models.weights import parameters_on_meta
from tests.helpers.tiny_models import PlainDecoder

WIDTH, BLOCKS = 64, 8


def gpt2() -> Any:
    config = GPT2Config(vocab_size=512, n_positions=32, n_embd=WIDTH, n_layer=BLOCKS, n_head=2)
    return AutoModelForCausalLM.from_config(config)


class NanoGPT(nn.Module):
    """Sets its weights as nanoGPT does: in one method of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.gain = nn.Parameter(torch.empty(WIDTH))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif module is self:
            rows, columns = self.layers[0].weight[:1], self.layers[0].weight[1:2]
            nn.init.uniform_(rows)
            nn.init.uniform_(columns)
            nn.init.uniform_(self.gain)


def filled(make: Callable[[], nn.Module], here: Callable[[str], bool], seed: int = 7) -> Any:
    with parameters_on_meta():
        module = make()
    for name, parameter in list(module.named_parameters()):
        if here(name):
            holder, _, attribute = name.rpartition(".")
            value = nn.Parameter(torch.empty_like(parameter, device="cpu"))
            setattr(module.get_submodule(holder), attribute, value)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    initialize(
        module, {n: p for n, p in module.named_parameters() if not p.is_meta}, seed, where="Test"
    )
    return {name: p.detach() for name, p in module.named_parameters() if not p.is_meta}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "nanogpt": NanoGPT,
    "modules of torch": PlainDecoder,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_part_has_the_values_that_it_has_in_the_whole(name: str) -> None:
    make = MODELS[name]
    generator = torch.get_rng_state()
    whole = filled(make, lambda _: True)
    assert torch.equal(torch.get_rng_state(), generator), "the run's generator has moved"
    names = list(whole)
    parts = [
        filled(make, set(names[begin::2]).__contains__)  # blocks torn apart, to be sure
        for begin in range(2)
    ]
    for part in parts:
        assert all(torch.equal(value, whole[key]) for key, value in part.items())
    assert set(parts[0]) | set(parts[1]) == set(whole)
    other = filled(make, lambda _: True, seed=8)
    assert any(not torch.equal(other[key], whole[key]) for key in whole)


def test_values_are_those_that_transformers_would_draw() -> None:
    """GPT-2: normal, and smaller by sqrt(2 n) at block outputs where transformers draws it so."""
    ours = filled(gpt2, lambda _: True)
    theirs = {name: p.detach() for name, p in gpt2().named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if theirs[name].std() == 0 or value.dim() == 1:
            assert torch.equal(value, theirs[name]), name
        else:
            # 4096 and more draws: the standard error of their deviation is below 1.1 %
            assert value.std() == pytest.approx(float(theirs[name].std()), rel=0.08), name
    if float(theirs["transformer.h.3.mlp.c_proj.weight"].std()) < 0.01:  # older ones do not
        small = ours["transformer.h.3.mlp.c_proj.weight"].std()
        assert float(small) == pytest.approx(0.02 / math.sqrt(2 * BLOCKS), rel=0.05)
    layers = [ours[f"transformer.h.{number}.attn.c_attn.weight"] for number in range(BLOCKS)]
    assert len({float(layer[0, 0]) for layer in layers}) == BLOCKS, "blocks are alike"


def test_parts_of_a_parameter_are_not_drawn_alike() -> None:
    weight = filled(NanoGPT, lambda _: True)["layers.0.weight"]
    assert not torch.equal(weight[0], weight[1])


def test_what_nothing_fills_is_refused_by_its_class() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    message = (
        r"Test\(model='Sequential'\): .* neither reset_parameters\(\) of Gain nor"
        r" _init_weights\(\) .* gives values to 'scale' of '1\.scale'\. Define Gain\.reset_par"
    )
    with pytest.raises(ValueError, match=message):
        filled(lambda: nn.Sequential(nn.Linear(3, 3), Gain()), lambda _: True)


def test_a_parameter_shared_before_it_is_registered_stays_shared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = nn.Parameter(torch.zeros(2, 2))
            self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
            self.one.weight = self.other.weight = weight

    with parameters_on_meta():
        module = Shared()
    assert module.one.weight is module.other.weight
    assert module.one.weight.is_meta
