"""Activations recomputed in backward: no bit changes, and less is kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_align.layers import ModelLayers, checkpoint_blocks, find_layers
from tests.helpers.decoders import tokens
from tests.helpers.tiny_models import (
    MAX_POSITIONS,
    NUM_BLOCKS,
    TINY_MODELS,
    PlainDecoder,
    TiedDecoder,
    tiny_openai_gpt,
)


def step(model: nn.Module, layers: ModelLayers) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients and number of saved activations of one training step with a fixed seed."""
    parameters = {id(parameter) for parameter in model.parameters()}
    saved = [0]

    def pack(tensor: Tensor) -> Tensor:
        saved[0] += 0 if id(tensor) in parameters else tensor.numel()
        return tensor

    model.zero_grad()
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_BTD = layers.hidden_states(tokens(length=32))
    loss = layers.head.logits(hidden_BTD).logsumexp(-1).mean()
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), gradients, saved[0]


WITH_DROPOUT = {
    "gpt2": lambda: TINY_MODELS["gpt2"](resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1),
    "gemma2": lambda: TINY_MODELS["gemma2"](attention_dropout=0.1),
    "mixtral": lambda: TINY_MODELS["mixtral"](attention_dropout=0.1),
    "plain": lambda: PlainDecoder(dropout=0.1),
    "tied": lambda: TiedDecoder(dropout=0.1),
}


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_checkpointing_saves_less_and_changes_no_bit(name: str) -> None:
    model = WITH_DROPOUT[name]()
    layers = find_layers(model)
    keys = list(model.state_dict())
    loss, gradients, saved = step(model, layers)
    checkpoint_blocks(layers)
    loss_2, gradients_2, saved_2 = step(model, layers)
    assert torch.equal(loss, loss_2)
    assert gradients.keys() == gradients_2.keys()
    assert all(torch.equal(gradients[key], gradients_2[key]) for key in gradients)
    assert len(gradients) == len(list(model.parameters()))
    # What is left are the inputs of the blocks and the final norm.
    assert saved_2 < 0.15 * saved
    assert list(model.state_dict()) == keys
    layers.probe()


@pytest.mark.parametrize("name", ["gpt2", "plain"])
def test_checkpointing_twice_is_once(name: str) -> None:
    layers = find_layers(WITH_DROPOUT[name]())
    checkpoint_blocks(layers)
    once = [vars(block).get("forward") for block in layers.blocks]
    checkpoint_blocks(layers)
    assert [vars(block).get("forward") for block in layers.blocks] == once


@pytest.mark.parametrize("name", ["gpt2", "plain"])
def test_checkpointing_rests_in_evaluation_and_without_gradients(name: str) -> None:
    model = WITH_DROPOUT[name]()
    layers = find_layers(model)
    model.eval()
    _, _, saved = step(model, layers)
    checkpoint_blocks(layers)
    assert step(model, layers)[2] == saved
    model.train()
    calls = []
    layers.blocks[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with torch.no_grad():
        assert not layers.hidden_states(tokens()).requires_grad
    assert calls == [False]


@pytest.mark.parametrize("name", ["gpt2", "plain"])
def test_checkpointing_leaves_frozen_blocks_out_of_backward(name: str) -> None:
    """With everything below the last block frozen, nothing below it may ask for gradients."""
    model = WITH_DROPOUT[name]()
    layers = find_layers(model)
    checkpoint_blocks(layers)
    model.requires_grad_(False)
    layers.blocks[-1].requires_grad_(True)
    requires_grad = []
    for block in layers.blocks:
        block.register_forward_hook(
            lambda module, args, output: requires_grad.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    _, gradients, _ = step(model, layers)
    assert requires_grad == [False] * (NUM_BLOCKS - 1) + [True]
    assert all(key.startswith(layers.block_names[-1]) for key in gradients)


@pytest.mark.parametrize("name", ["gpt2", "plain"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_runs_its_own_blocks(name: str, duplicate) -> None:
    model = WITH_DROPOUT[name]()
    layers = find_layers(model)
    checkpoint_blocks(layers)
    expected = step(model, layers)
    model.zero_grad()
    other = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loss, gradients, saved = step(other, find_layers(other))
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(gradients[key], expected[1][key]) for key in expected[1])
    assert saved == expected[2]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_checkpointing_keeps_a_forward_that_was_overridden() -> None:
    model = PlainDecoder()
    layers = find_layers(model)
    original = layers.blocks[0].forward
    layers.blocks[0].forward = lambda x_BTD, mask_BT: 2 * original(x_BTD, mask_BT)
    before = layers.hidden_states(tokens())
    checkpoint_blocks(layers)
    assert torch.equal(layers.hidden_states(tokens()), before)


def test_checkpointed_hugging_face_model_still_trains_through_its_own_forward() -> None:
    """Its default fills a cache, which the recomputation would fill a second time."""
    model = TINY_MODELS["llama"]()
    layers = find_layers(model)
    ids_BT = tokens(length=MAX_POSITIONS // 2)
    model(ids_BT, labels=ids_BT).loss.backward()
    before = layers.embedding.weight.grad.clone()
    model.zero_grad()
    checkpoint_blocks(layers)
    output = model(ids_BT, labels=ids_BT)
    output.loss.backward()
    assert torch.equal(layers.embedding.weight.grad, before)
    assert output.past_key_values is None or output.past_key_values.get_seq_length() == 0


def test_a_model_without_checkpointing_of_its_own_gets_ours() -> None:
    model = tiny_openai_gpt()
    assert not model.supports_gradient_checkpointing
    layers = find_layers(model)
    layers.probe()
    loss, gradients, saved = step(model, layers)
    checkpoint_blocks(layers)
    loss_2, gradients_2, saved_2 = step(model, layers)
    assert torch.equal(loss, loss_2)
    assert all(torch.equal(gradients[key], gradients_2[key]) for key in gradients)
    assert saved_2 < 0.15 * saved
