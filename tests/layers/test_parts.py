"""Which part of a model a parameter belongs to."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_align.callbacks.lisa_layers import partition
from lightning_align.layers import ModelLayers, find_layers
from lightning_align.layers.parts import Part, Parts, find_parts
from lightning_align.strategies.pipeline.find_chain import find_chain
from tests.helpers.decoders import MODELS
from tests.helpers.tiny_models import PlainDecoder, TiedDecoder

every_model = pytest.mark.parametrize("name", MODELS)


def in_order(parts: Parts) -> list[str]:
    return [*parts.embedding, *chain.from_iterable(parts.blocks), *parts.head]


def by_identity(layers: ModelLayers) -> dict[nn.Parameter, set[Part]]:
    """What uses each parameter, read off the modules and not off the names."""
    users: dict[nn.Parameter, set[Part]] = {p: set() for p in layers.model.parameters()}
    sides = [(layers.embedding, "embedding"), (layers.head_module, "head")]
    sides += [(layers.final_norm, "head")] if layers.final_norm else []
    owners = dict(sides) | {block: number for number, block in enumerate(layers.blocks)}

    def walk(module: nn.Module, owner: Any) -> None:
        owner = owners.get(module, owner)
        for parameter in module.parameters(recurse=False):
            users[parameter].add(owner)
        for child in module.children():
            walk(child, owner)

    walk(layers.model, None)
    for found in users.values():
        if None in found and not found & {"embedding", "head"}:
            found.add("embedding")
        found.discard(None)
    return users


def check(layers: ModelLayers) -> Parts:
    """Each parameter once, by its first name, in the first of the parts that use it."""
    parts, model = find_parts(layers), layers.model
    first_names = [name for name, _ in model.named_parameters()]
    assert Counter(in_order(parts)) == Counter(first_names), "each once, under its first name"
    assert len(parts.blocks) == len(layers.blocks)
    rank = {"embedding": -2, "head": -1}
    expected = by_identity(layers)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users = sorted(expected[parameter], key=lambda part: rank.get(part, part))
        assert list(parts.users[name]) == users, name
        assert parts.part_of(name) == users[0]
    belongs = {"embedding": parts.embedding, "head": parts.head, **dict(enumerate(parts.blocks))}
    for part, names in belongs.items():
        assert {*names} <= {*parts.used_by(part)}
        assert all(parts.part_of(name) == part for name in names)
        assert list(names) == [name for name in first_names if name in names], "in their order"
    return parts


# Models as they are


@every_model
def test_every_parameter_of_every_family_is_in_one_part(name: str) -> None:
    layers = find_layers(MODELS[name]())
    parts = check(layers)
    for number, (block, prefix) in enumerate(zip(parts.blocks, layers.block_names, strict=True)):
        own = layers.model.get_submodule(prefix).named_parameters(prefix=prefix)
        assert list(block) == [name for name, _ in own] == list(parts.used_by(number))


def test_the_parts_of_a_model_in_names() -> None:
    parts = find_parts(find_layers(PlainDecoder(num_blocks=2)))
    assert parts.embedding == ("positions.weight", "tokens.weight")
    assert parts.head == ("norm.weight", "norm.bias", "to_logits.weight", "to_logits.bias")
    assert parts.blocks[1][:2] == ("layers.1.norm_1.weight", "layers.1.norm_1.bias")
    assert parts.part_of("layers.1.mlp.0.bias") == 1
    with pytest.raises(KeyError):
        parts.part_of("layers.2.mlp.0.bias")


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma2", "tied"])
def test_a_tied_head_is_named_with_the_embedding_and_used_by_both(name: str) -> None:
    layers = find_layers(MODELS[name]())
    parts = find_parts(layers)
    embedding, head = f"{layers.embedding_name}.weight", f"{layers.head_name}.weight"
    assert embedding in parts.embedding
    assert head not in in_order(parts)
    assert parts.part_of(head) == parts.part_of(embedding) == "embedding"
    assert parts.users[head] == ("embedding", "head")
    assert {embedding, head} <= {*parts.used_by("head")}


def test_a_tied_weight_goes_by_its_first_name_even_if_that_is_the_head() -> None:
    class HeadFirst(PlainDecoder):
        def __init__(self) -> None:
            super().__init__()
            positions, tokens = self.positions, self.tokens
            del self.positions, self.tokens
            self.positions, self.tokens = positions, tokens  # registered last
            self.tokens.weight = self.to_logits.weight

    parts = check(find_layers(HeadFirst()))
    assert parts.embedding == ("to_logits.weight", "positions.weight")


def test_another_name_for_the_head_is_still_the_head_and_one_for_a_block_is_outside() -> None:
    model = PlainDecoder()
    model.out, model.first = model.to_logits, model.layers[0].mlp[0]
    parts = check(find_layers(model))
    assert parts.part_of("out.weight") == parts.part_of("to_logits.weight") == "head"
    assert parts.users["layers.0.mlp.0.weight"] == ("embedding", 0)
    assert "layers.0.mlp.0.weight" in parts.embedding
    assert parts.part_of("layers.0.mlp.2.weight") == 0


# Models as they might be


class Nested(nn.Module):
    """A decoder in a submodule, beside a parameter that is in no module of it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.body = body


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """Any number of blocks, tied or not, with parameters shared and modules named once more."""
    model = draw(st.sampled_from([PlainDecoder, TiedDecoder]))(11, 4, draw(st.integers(1, 12)))
    model = Nested(model) if draw(st.booleans()) else model
    held = [(m, name) for m in model.modules() for name, _ in m.named_parameters(recurse=False)]
    for _ in range(draw(st.integers(0, 4))):
        owner, name = draw(st.sampled_from(held))
        shape = getattr(owner, name).shape
        other, other_name = draw(st.sampled_from([x for x in held if getattr(*x).shape == shape]))
        setattr(owner, name, getattr(other, other_name))
    if draw(st.booleans()):
        leaves = [m for m in model.modules() if not [*m.children()]]
        model.again = draw(st.sampled_from(leaves))
    return model


def layers_of(model: nn.Module) -> ModelLayers:
    """The map as its builder knows it; after sharing, it might not be found."""
    is_tied = isinstance(getattr(model, "body", model), TiedDecoder)
    names = ("transformer.wte", "transformer.h", "transformer.ln_f", "lm_head")
    names = names if is_tied else ("tokens", "layers", "norm", "to_logits")
    prefix = "body." if isinstance(model, Nested) else ""
    return ModelLayers(model, *(prefix + name for name in names), hidden_size=4, vocab_size=11)


@settings(deadline=None)
@given(models())
def test_parts_are_disjoint_and_complete_whatever_is_shared(model: nn.Module) -> None:
    check(layers_of(model))


# Who else says which part a parameter is of


@every_model
def test_the_pipeline_finds_the_same_parts_by_what_is_called_when(name: str) -> None:
    module = pl.LightningModule()
    module.model = MODELS[name]()
    module.layers = find_layers(module.model)
    named = dict(module.model.named_parameters(remove_duplicate=False))
    parts = find_parts(module.layers)
    ours = [
        {named[name] for name in parts.used_by(part)}
        for part in ("embedding", *range(len(parts.blocks)), "head")
    ]
    found = find_chain(module)
    theirs = [
        {parameter for module in modules for parameter in module.parameters()}
        for modules in (found.before, *([layer] for layer in found.layers), found.after)
    ]
    found.close()
    assert ours == theirs


@every_model
def test_lisa_switches_the_same_parts(name: str) -> None:
    model = MODELS[name]()
    layers = find_layers(model)
    parts = find_parts(layers)
    named = dict(model.named_parameters())
    found = partition(model, layers, train_embeddings=False, train_head=False)
    assert found.never == {named[name] for name in (*parts.embedding, *parts.head)}
    assert found.blocks == tuple(frozenset(named[n] for n in block) for block in parts.blocks)
    assert not found.always
