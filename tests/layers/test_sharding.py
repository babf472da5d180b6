"""A model that ranks share: gradients of losses that read its head outside of ``forward``."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_align.layers import ModelLayers, checkpoint_blocks, find_layers
from lightning_align.layers.sharding import (
    as_forward,
    check_can_shard,
    follow_freezing,
    is_sharded,
    shard,
)
from lightning_align.losses import linear_cross_entropy
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY_MODELS, VOCAB_SIZE, TiedDecoder

NAMES = ("llama", "gpt2", "gemma2", "mixtral")
# The one written by hand is called as a whole, with its head as the identity.
MODELS: dict[str, Callable[[], Any]] = {
    **{name: TINY_MODELS[name] for name in NAMES},
    "by hand, tied": TiedDecoder,
}
IDS = torch.randint(VOCAB_SIZE, (4, 9), generator=torch.Generator().manual_seed(0))


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]()


def loss_of(layers: ModelLayers, ids: Tensor) -> Tensor:
    hidden_BTD = layers.hidden_states(ids[:, :-1])
    return linear_cross_entropy(hidden_BTD, layers.head, ids[:, 1:]).loss


def gradients_on_a_rank(rank: int, layers: ModelLayers) -> dict[str, Tensor]:
    """Gradients of two backwards that add up, with half of the rows on each rank."""
    shard(layers, init_device_mesh("cpu", (2,)), where="test")
    assert is_sharded(layers.model)
    own = IDS[2 * rank : 2 * rank + 2]
    with torch.inference_mode():  # what an evaluation leaves behind does not matter
        as_forward(layers.model, lambda: loss_of(layers, own))
    assert all(isinstance(p, DTensor) for p in layers.model.parameters())
    for _ in range(2):
        as_forward(layers.model, lambda: loss_of(layers, own)).backward()
    named: Any = layers.model.named_parameters()
    return {name: parameter.grad.full_tensor() for name, parameter in named}


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_are_those_of_one_process(checkpoint: bool) -> None:
    def layers_of(name: str) -> ModelLayers:
        layers = find_layers(model_of(name))
        if checkpoint:
            checkpoint_blocks(layers)
        return layers

    def on_a_rank(rank: int) -> dict[str, dict[str, Tensor]]:
        return {name: gradients_on_a_rank(rank, layers_of(name)) for name in MODELS}

    results = run_ranks(on_a_rank)
    for name in MODELS:
        layers = layers_of(name)
        loss_of(layers, IDS).backward()
        for key, parameter in layers.model.named_parameters():
            for ours in results:
                # FSDP takes the mean over two ranks, and there were two backwards. fp32 sums in
                # another order.
                torch.testing.assert_close(ours[name][key], parameter.grad, rtol=1e-4, atol=1e-4)


def test_a_loss_without_gathered_weights_is_no_silent_one() -> None:
    def on_a_rank(rank: int) -> None:
        layers = find_layers(model_of("llama"))
        shard(layers, init_device_mesh("cpu", (2,)), where="test")
        with pytest.raises(RuntimeError, match="DTensor"):
            loss_of(layers, IDS)

    run_ranks(on_a_rank)


def test_a_model_that_is_whole_is_just_called() -> None:
    layers = find_layers(model_of("llama"))
    assert as_forward(layers.model, lambda: 3) == 3


def test_blocks_that_share_parameters_are_refused() -> None:
    model: Any = model_of("llama")
    first, second, *_ = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    rule = r"^x\(model='LlamaForCausalLM'\): parameters that blocks share .*layers\.0\.mlp\.up_proj"
    with pytest.raises(ValueError, match=rule):
        check_can_shard(find_layers(model), "x")


def test_a_block_in_several_data_types_is_refused_unless_they_are_frozen() -> None:
    model: Any = model_of("llama")
    norm = model.model.layers[1].input_layernorm.to(torch.bfloat16)
    rule = r"block 'model\.layers\.1' trains in several data types .*Load it with one dtype"
    with pytest.raises(ValueError, match=rule):
        check_can_shard(find_layers(model), "x")
    norm.requires_grad_(False)
    check_can_shard(find_layers(model), "x")


def test_what_is_frozen_is_followed_or_refused() -> None:
    def on_a_rank(rank: int) -> None:
        layers = find_layers(model_of("llama"))
        shard(layers, init_device_mesh("cpu", (2,)), where="test")
        layers.model.requires_grad_(False)
        layers.blocks[1].requires_grad_(True)
        follow_freezing(layers.model)
        assert all(isinstance(p, DTensor) for p in layers.model.parameters())
        as_forward(layers.model, lambda: loss_of(layers, IDS)).backward()
        with_gradient = {n for n, p in layers.model.named_parameters() if p.grad is not None}
        assert with_gradient == {n for n, p in layers.model.named_parameters() if p.requires_grad}
        assert all(name.startswith(layers.block_names[1]) for name in with_gradient)
        # As a torch that does not look would have it.
        layers.model.requires_grad_(True)
        look = "torch.distributed.fsdp._fully_shard._fsdp_param.set_requires_grad_if_needed"
        rule = r"fully_shard\(module='.*'\): torch .* does not follow where parameters are frozen"
        with mock.patch(look), pytest.raises(ValueError, match=rule):
            follow_freezing(layers.model)

    run_ranks(on_a_rank)
