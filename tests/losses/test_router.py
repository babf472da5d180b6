"""The load-balancing loss: known values, transformers' own, and when it is on."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DogeConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lightning_align.losses import (
    dpo_loss_from_batch,
    load_balancing_loss,
    router_coefficient,
)
from tests.helpers.tiny_models import TINY_MODELS


def test_experts_that_are_used_alike_cost_one():
    """4 tokens, each sure of another one of 4 experts: 4 x (4 x 1/4 x 1/4) = 1."""
    logits = [100 * torch.eye(4)]
    assert load_balancing_loss(logits, 1, torch.ones(1, 4)).item() == pytest.approx(1)


def test_a_router_that_knows_one_expert_costs_as_many_as_there_are():
    logits = [torch.tensor([[100.0, 0, 0, 0]]).repeat(6, 1)]
    assert load_balancing_loss(logits, 1, torch.ones(2, 3)).item() == pytest.approx(4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balancing_matches_transformers(top_k):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(12, 5, generator=generator, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    ours = load_balancing_loss(logits, top_k, mask)
    theirs = load_balancing_loss_func(tuple(logits), 5, top_k, mask)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, logits) for loss in (ours, theirs)]
    for our, their in zip(*gradients, strict=True):
        torch.testing.assert_close(our, their)
        assert (our[mask.flatten() == 0] == 0).all()


def test_nothing_but_padding_costs_nothing():
    assert load_balancing_loss([torch.randn(4, 3)], 1, torch.zeros(2, 2)) == 0


def test_pairs_that_are_none_are_left_out_of_a_batch():
    """What a sampler fills up a rank with routes its tokens like others, and must not count."""
    model, length = TINY_MODELS["mixtral"](), 8
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(1, 90, (6, length), generator=generator),
        "attention_mask": torch.ones(6, length, dtype=torch.long),
        "completion_mask": (torch.arange(length) > 3).long().repeat(6, 1),
    }
    options = {"loss_type": "cpo", "router_aux_loss_coef": 0.5}
    rows = [0, 1, 3, 4]
    alone, expected = dpo_loss_from_batch(
        model, None, {name: values[rows] for name, values in batch.items()}, **options
    )
    batch["completion_mask"][[2, 5]] = 0
    loss, metrics = dpo_loss_from_batch(model, None, batch, **options)
    torch.testing.assert_close(metrics["aux_loss"], expected["aux_loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)


class Plain(torch.nn.Module):
    """A module without a configuration."""


def test_it_is_on_where_the_model_has_a_router():
    model = Plain()
    assert router_coefficient(model, None, "f") == 0
    assert router_coefficient(TINY_MODELS["llama"](), None, "f") == 0
    model.config = MixtralConfig(router_aux_loss_coef=0.3)
    assert router_coefficient(model, None, "f") == 0.3
    assert router_coefficient(model, 0.7, "f") == 0.7
    assert router_coefficient(model, 0.0, "f") == 0
    model.config = Qwen3MoeConfig()
    assert router_coefficient(model, None, "f") == model.config.router_aux_loss_coef > 0


@pytest.mark.parametrize("given", [-1.0, float("nan"), float("inf")])
def test_weights_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=rf"f\(router_aux_loss_coef={given}\): must be finite"):
        router_coefficient(Plain(), given, "f")


def test_a_model_without_experts_cannot_have_one():
    model = TINY_MODELS["llama"]()
    with pytest.raises(ValueError, match="is no mixture of experts"):
        dpo_loss_from_batch(model, None, {}, loss_type="cpo", router_aux_loss_coef=0.1)


def test_a_router_that_says_nothing_has_no_loss_unless_one_is_asked_for():
    """Doge's configuration has a weight, and only its sparse models have routers."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(DogeConfig(**sizes, **heads))
    assert router_coefficient(model, None, "f") > 0
    ids = torch.randint(1, 32, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["completion_mask"] = (torch.arange(6) > 2).long().repeat(2, 1)
    _, metrics = dpo_loss_from_batch(model, None, batch, loss_type="cpo")
    assert "aux_loss" not in metrics
    with pytest.raises(ValueError, match=r"coef=0.1\): .*DogeForCausalLM gives no router logits"):
        dpo_loss_from_batch(model, None, batch, loss_type="cpo", router_aux_loss_coef=0.1)
