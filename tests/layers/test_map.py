"""The map of a model. Shapes: B batch, T tokens, D hidden size, V vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_align.layers import find_layers
from tests.helpers.decoders import MODELS, Outputs, own_logits, tokens
from tests.helpers.tiny_models import (
    HIDDEN_SIZE,
    NUM_BLOCKS,
    TINY_MODELS,
    VOCAB_SIZE,
    PlainDecoder,
    TiedDecoder,
)

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_hidden_states_and_head_give_the_models_own_logits(name: str) -> None:
    model = MODELS[name]()
    layers = find_layers(model)
    ids_BT = tokens()
    ours = layers.head.logits(layers.hidden_states(ids_BT))
    theirs = own_logits(model, ids_BT)
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs)
    layers.probe()


@every_model
def test_map_names_the_parts(name: str) -> None:
    model = MODELS[name]()
    layers = find_layers(model)
    assert layers.embedding.weight.shape == (VOCAB_SIZE, HIDDEN_SIZE)
    assert layers.embedding is not getattr(model, "positions", None)
    assert len(layers.blocks) == len(layers.block_names) == NUM_BLOCKS
    for block, block_name in zip(layers.blocks, layers.block_names, strict=True):
        assert model.get_submodule(block_name) is block
    assert (layers.vocab_size, layers.hidden_size) == layers.head.weight.shape
    assert layers.head_module.weight is layers.head.weight
    tied = ((f"{layers.embedding_name}.weight", f"{layers.head_name}.weight"),)
    assert layers.tied_parameters == (tied if layers.embedding.weight is layers.head.weight else ())


@every_model
def test_final_norm_makes_the_hidden_states_and_blocks_run_in_order(name: str) -> None:
    model = MODELS[name]()
    layers = find_layers(model)
    outputs: dict[str, Tensor] = {}
    parts = [*layers.block_names, layers.final_norm_name]
    for part in parts:
        model.get_submodule(part).register_forward_hook(
            lambda module, args, output, part=part: outputs.update({part: output})
        )
    hidden_BTD = layers.hidden_states(tokens())
    assert list(outputs) == parts
    assert torch.equal(outputs[layers.final_norm_name], hidden_BTD)


def test_head_is_read_live() -> None:
    model = TINY_MODELS["llama_tied"]()
    layers = find_layers(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB_SIZE, HIDDEN_SIZE))
    assert layers.head.weight is model.lm_head.weight
    assert layers.tied_parameters == ()
    model.resize_token_embeddings(VOCAB_SIZE + 4)
    assert layers.head.weight.shape == (VOCAB_SIZE + 4, HIDDEN_SIZE)
    assert layers.embedding.num_embeddings == VOCAB_SIZE + 4


@every_model
def test_hidden_states_compute_no_logits(name: str) -> None:
    layers = find_layers(MODELS[name]())
    with Outputs() as outputs:
        layers.hidden_states(tokens())
    assert outputs.seen
    assert not [shape for _, shape in outputs.seen if shape[-1:] == (VOCAB_SIZE,)]


def test_hidden_states_and_head_run_what_the_model_runs() -> None:
    layers = find_layers(PlainDecoder())
    ids_BT = tokens()
    with Outputs() as ours:
        layers.head.logits(layers.hidden_states(ids_BT))
    with Outputs() as theirs:
        layers.model(ids_BT)
    assert ours.seen == theirs.seen


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere2", "opt", "plain"])
def test_positions_and_mask_reach_the_model(name: str) -> None:
    model = MODELS[name]()
    layers = find_layers(model)
    ids_BT = tokens()
    extra = {
        "position_ids": torch.arange(12).mul(2).expand(2, -1),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
    }
    extra["attention_mask"][1, 8:] = 0
    ours = layers.head.logits(layers.hidden_states(ids_BT, **extra))
    torch.testing.assert_close(ours, own_logits(model, ids_BT, **extra))
    for missing in extra:
        given = {key: value for key, value in extra.items() if key != missing}
        assert not torch.allclose(ours, layers.head.logits(layers.hidden_states(ids_BT, **given)))


@pytest.mark.parametrize("argument", ["position_ids", "attention_mask"])
def test_an_argument_that_forward_lacks_is_refused(argument: str) -> None:
    layers = find_layers(TiedDecoder())
    with pytest.raises(ValueError, match=rf"hidden_states\({argument}=.*has no argument"):
        layers.hidden_states(tokens(), **{argument: torch.ones(2, 12)})


def test_the_head_is_itself_again_after_an_error() -> None:
    model = PlainDecoder()
    layers = find_layers(model)
    with pytest.raises(IndexError):
        layers.hidden_states(tokens() + VOCAB_SIZE)
    assert "forward" not in vars(model.to_logits)
    assert model(tokens()).shape == (2, 12, VOCAB_SIZE)
    override = vars(model.to_logits)["forward"] = lambda hidden: hidden[..., :1]
    assert layers.hidden_states(tokens()).shape == (2, 12, HIDDEN_SIZE)
    assert vars(model.to_logits)["forward"] is override


def test_router_logits_come_with_the_same_hidden_states() -> None:
    """Of each layer those of all tokens, as the model's own forward gives them."""
    model = TINY_MODELS["mixtral"]()
    layers, ids = find_layers(model), torch.arange(1, 11).view(2, 5)
    hidden, router_logits = layers.hidden_states_and_router_logits(ids)
    assert torch.equal(hidden, layers.hidden_states(ids))
    theirs = model(ids, output_router_logits=True).router_logits
    assert [tuple(logits.shape) for logits in router_logits] == [(10, 4)] * len(layers.blocks)
    for ours, their in zip(router_logits, theirs, strict=True):
        assert torch.equal(ours, their)
        assert ours.requires_grad
    assert layers.gives_router_logits()


@pytest.mark.parametrize("model", [TINY_MODELS["llama"](), PlainDecoder()], ids=["llama", "own"])
def test_a_dense_model_gives_no_router_logits(model: nn.Module) -> None:
    layers, ids = find_layers(model), torch.arange(1, 11).view(2, 5)
    hidden, router_logits = layers.hidden_states_and_router_logits(ids)
    assert torch.equal(hidden, layers.hidden_states(ids))
    assert router_logits == []
    assert not layers.gives_router_logits()
