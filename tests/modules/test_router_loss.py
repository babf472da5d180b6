"""The load-balancing loss of a mixture of experts, as DPOModule trains it."""

import pytest
import torch
from transformers import DogeConfig

from lightning_align.losses import dpo_loss_from_batch
from tests.modules.test_dpo import (
    UNPAIRED,
    VOCABULARY,
    assert_step_equals_the_function,
    mixture_of_experts,
    module,
    pairs,
    step,
)
from tests.modules.test_pretrain import fit


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_router_is_trained_by_its_own_loss(checkpointing: bool) -> None:
    """It is a part of the loss, with the gradient that the function of a batch gives."""
    ours = module(
        mixture_of_experts(), router_aux_loss_coef=0.5, activation_checkpointing=checkpointing
    )
    batch = pairs(0, 1, 2)
    theirs, metrics = dpo_loss_from_batch(
        ours.model, ours.reference_layers.model, batch, router_aux_loss_coef=0.5
    )
    loss, sums = step(ours, batch)
    torch.testing.assert_close(loss / 3, theirs, rtol=1e-6, atol=0)
    total, count = sums["aux_loss"]
    torch.testing.assert_close(total / count, metrics["aux_loss"], rtol=1e-6, atol=0)
    routers = [p for name, p in ours.model.named_parameters() if "gate" in name]
    assert routers
    for ours_, theirs_ in zip(
        torch.autograd.grad(loss / 3, routers), torch.autograd.grad(theirs, routers), strict=True
    ):
        assert ours_.abs().max() > 0
        torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-6)


def test_a_router_that_says_nothing_is_named_at_set_up() -> None:
    """Doge's configuration has a weight, and only its sparse models have routers."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = DogeConfig(**sizes, **heads, pad_token_id=0)
    with pytest.warns(UserWarning, match="gives no router logits. It trains without that loss"):
        trainer = fit(module(config), [pairs(0, 1)])
    assert "aux_loss" not in trainer.callback_metrics
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0.1\): .*gives no router logits"):
        fit(module(config, router_aux_loss_coef=0.1), [pairs(0, 1)])


def test_what_a_router_said_is_not_kept() -> None:
    """Attributes of a module are saved with a run, and the tensors would hold its graph."""
    ours = module(mixture_of_experts(), loss_type="kto", router_aux_loss_coef=0.5)
    for use in (
        lambda: step(ours, UNPAIRED),
        lambda: ours.predict_step(UNPAIRED, 0),
        lambda: ours(UNPAIRED["input_ids"]),
        lambda: ours.batch_loss(UNPAIRED),
    ):
        use()
        assert ours._router._logits == []
    assert_step_equals_the_function(ours, UNPAIRED, loss_type="kto", router_aux_loss_coef=0.5)


def test_a_router_does_not_count_what_fills_up_a_rank() -> None:
    ours, batch = module(mixture_of_experts(), router_aux_loss_coef=0.5), pairs(0, 1)
    alone, _ = step(ours, {name: rows[[0, 2]] for name, rows in batch.items()})
    batch["completion_mask"][[1, 3]] = 0
    torch.testing.assert_close(step(ours, batch)[0], alone)


def test_a_router_loss_is_on_by_default_and_can_be_switched_off() -> None:
    """As in TRL, with the weight in the model's configuration."""
    on = module(mixture_of_experts(router_aux_loss_coef=0.25))
    off = module(mixture_of_experts(), router_aux_loss_coef=0.0)
    assert on._router.coefficient == 0.25
    assert "with router_aux_loss_coef=0" in str(on.pipeline_refusal)
    assert "reference would have to run" in str(off.pipeline_refusal)
    loss, sums = step(on, pairs(0, 1))
    without, no_sums = step(off, pairs(0, 1))
    torch.testing.assert_close(loss - without, 0.25 * sums["aux_loss"][0])
    assert "aux_loss" not in no_sums
    assert "aux_loss" in fit(on, [pairs(0, 1)]).callback_metrics
