"""Where a module can be cut: its chain of layers, found or named."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_align import PretrainModule
from lightning_align.models.weights import parameters_on_meta
from lightning_align.strategies.pipeline.chain import Chain
from lightning_align.strategies.pipeline.find_chain import find_chain
from tests.helpers.ranks import run_ranks
from tests.helpers.sequential import fit_sequential
from tests.helpers.tiny_models import NUM_BLOCKS, TINY_MODELS, PlainDecoder, tiny_openai_gpt


class Holding(pl.LightningModule):
    """Holds modules under names."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Naming(Holding):
    def __init__(self, layers: list[Any], **parts: nn.Module) -> None:
        super().__init__(**parts)
        self.named = layers.copy  # no attribute that registers them

    def pipeline_layers(self) -> list[Any]:
        return self.named()


@contextmanager
def found(module: pl.LightningModule) -> Iterator[Chain]:
    chain = find_chain(module)
    try:
        yield chain
    finally:
        chain.close()


def linears(count: int = 3) -> list[nn.Linear]:
    return [nn.Linear(2, 2) for _ in range(count)]


def test_pipeline_layers_are_taken_as_they_are() -> None:
    one, other = linears(2)
    with found(Naming([one, other, one], net=nn.Sequential(*linears()))) as chain:
        assert chain.layers == [one, other, one]
        assert chain.owned(0, 3) == [one, other, one]


def test_the_only_sequential_that_holds_all_parameters_is_found_however_deep() -> None:
    layers = linears()
    net = nn.Sequential(*layers)
    inner = nn.Module()
    inner.net, inner.loss = net, nn.CrossEntropyLoss()
    with found(Holding(model=inner, metric=nn.Identity())) as chain:
        assert chain.layers == layers


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "llama_tied"])
@pytest.mark.parametrize("wrap", [PretrainModule, lambda model: Holding(model=model)])
def test_a_decoder_is_cut_between_its_blocks_and_its_ends_go_with_the_outer_ones(
    name: str, wrap: Callable[[Any], pl.LightningModule]
) -> None:
    model = TINY_MODELS[name]()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with found(wrap(model)) as chain:
        assert len(chain.layers) == NUM_BLOCKS
        assert embedding in chain.before
        assert head in chain.after
        owned = {p for part in chain.owned(0, NUM_BLOCKS) for p in part.parameters()}
        assert owned == set(model.parameters())
        first = {p for part in chain.owned(0, 1) for p in part.parameters()}
        last = {p for part in chain.owned(1, NUM_BLOCKS) for p in part.parameters()}
        tied = {embedding.weight} if embedding.weight is head.weight else set()
        assert first & last == tied
    assert model(torch.zeros(1, 2, dtype=torch.long)).logits.isfinite().all()


def test_finding_computes_nothing_of_a_decoder_without_weights() -> None:
    with parameters_on_meta():
        model = TINY_MODELS["llama"]()
    with found(PretrainModule(model)) as chain:
        assert chain.before == [model.model.embed_tokens]
        assert set(chain.after) == {model.model.norm, model.lm_head}


class Backwards(PlainDecoder):
    def forward(self, input_ids: Any, position_ids: Any = None, attention_mask: Any = None) -> Any:
        x_BTD = self.tokens(input_ids)
        for layer in reversed(self.layers):
            x_BTD = layer(x_BTD, attention_mask)
        return self.to_logits(self.norm(x_BTD))


REFUSED: dict[str, tuple[Callable[[], pl.LightningModule], str]] = {
    "nothing": (lambda: Naming([]), r"its pipeline_layers\(\) must return modules in the order"),
    "no modules": (lambda: Naming(["net"]), r"its pipeline_layers\(\) must return modules"),
    "two parts": (
        lambda: Holding(one=nn.Sequential(*linears()), other=nn.Linear(2, 2)),
        r"cannot tell the chain of layers .* it holds \['one', 'other'\]\. Define pipeline_layers",
    ),
    "a parameter beside it": (
        lambda: Holding(net=nn.Sequential(*linears()), scale=nn.Parameter(torch.ones(1))),  # type: ignore[arg-type]
        r"cannot tell the chain of layers",
    ),
    "blocks in another order": (
        lambda: PretrainModule(Backwards()),
        r"each block of its Backwards must be called once, in their order\. Name the chain",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_there_is_no_chain_the_way_out_is_named(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        find_chain(make())


ONE_F_ONE_B = {"schedule": "1F1B", "num_microbatches": 4}
GPIPE = {"schedule": "GPipe", "num_microbatches": 4}


def test_sequential_is_found_with_what_the_step_calls_it_with() -> None:
    theirs, _ = fit_sequential(None, GPIPE)
    strategy = {**ONE_F_ONE_B, "partition_method": [2, 1]}
    (ours, _), _ = run_ranks(lambda rank: fit_sequential(rank, strategy))
    assert ours == pytest.approx(theirs, rel=2e-5)


def test_a_decoder_that_cannot_be_followed_is_refused_with_a_way_out() -> None:
    rule = r"forward of its OpenAIGPTLMHeadModel must run on values.*pipeline_layers\(\)"
    with pytest.raises(ValueError, match=rule):
        find_chain(Holding(net=tiny_openai_gpt()))
