"""Lists of losses, WPO's weights, and what a reference that is not there means."""

import math

import pytest
import torch

from lightning_align.losses import (
    LOSSES,
    CompletionScores,
    PairScores,
    PreferenceOptions,
    pair_losses,
    preference_loss,
)
from lightning_align.losses.options import READS

LOGPS = -3 * torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
ALL_OPTIONS = {
    "label_smoothing": 0.1,
    "f_alpha_divergence_coef": 0.3,
    "ld_alpha": 0.5,
    "length_alpha": 0.01,
    "discopop_tau": 0.1,
    "simpo_gamma": 1.0,
    "alphapo_alpha": 0.1,
    "sft_mean": "pairs",
    "chosen_lengths": torch.tensor([1, 2, 3, 4, 5]),
    "rejected_lengths": torch.tensor([2, 2, 2, 2, 2]),
}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_option_may_be_given_with_every_loss(loss_type):
    assert preference_loss(*LOGPS, loss_type=loss_type, **ALL_OPTIONS).shape == (5,)


def test_a_list_is_the_weighted_sum_of_its_losses():
    names, weights = [*LOSSES], [0.5 + index for index in range(len(LOSSES))]
    ours = preference_loss(*LOGPS, loss_type=names, loss_weights=weights, **ALL_OPTIONS)
    alone = [
        weight * preference_loss(*LOGPS, loss_type=name, **ALL_OPTIONS)
        for name, weight in zip(names, weights, strict=True)
    ]
    torch.testing.assert_close(ours, sum(alone))


def test_without_weights_each_loss_counts_once():
    ours = preference_loss(*LOGPS, loss_type=["sigmoid", "sft"])
    alone = (preference_loss(*LOGPS, loss_type=name) for name in ("sigmoid", "sft"))
    torch.testing.assert_close(ours, sum(alone))


def test_a_list_of_one_is_the_loss_to_the_bit():
    assert torch.equal(
        preference_loss(*LOGPS, loss_type=["hinge"]), preference_loss(*LOGPS, loss_type="hinge")
    )


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_loss_without_a_reference_does_not_need_one(loss_type):
    options = {"loss_type": loss_type, "label_smoothing": 0.1}
    if "reference_free" not in READS[loss_type]:
        alone = preference_loss(*LOGPS[:2], **options)
        assert torch.equal(alone, preference_loss(*LOGPS, **options))
        return
    with pytest.raises(ValueError, match=r"ref_chosen_logps=None.*set reference_free=True"):
        preference_loss(*LOGPS[:2], **options)
    free = preference_loss(*LOGPS[:2], reference_free=True, **options)
    uniform = preference_loss(*LOGPS[:2], torch.zeros(5), torch.zeros(5), **options)
    assert torch.equal(free, uniform)
    assert torch.equal(free, preference_loss(*LOGPS, reference_free=True, **options))


def test_half_a_reference_is_refused():
    with pytest.raises(ValueError, match=r"ref_rejected_logps=None.*both ref_logps must be given"):
        preference_loss(*LOGPS[:3])


def test_wpo_weighs_a_pair_by_both_completions():
    """Log-weights log(1/2) and log(1/4): an eighth of the loss, of every loss in the list."""
    weights = {
        "chosen_log_weights": torch.full((5,), math.log(1 / 2)),
        "rejected_log_weights": torch.full((5,), math.log(1 / 4)),
    }
    for names in ("sigmoid", ["sigmoid", "sft"]):
        plain = preference_loss(*LOGPS, loss_type=names)
        ours = preference_loss(*LOGPS, loss_type=names, use_weighting=True, **weights)
        torch.testing.assert_close(ours, plain / 8)
        assert torch.equal(plain, preference_loss(*LOGPS, loss_type=names, **weights))
    with pytest.raises(ValueError, match=r"use_weighting=True\).*pass chosen_log_weights"):
        preference_loss(*LOGPS, use_weighting=True)


def test_wpo_weights_have_no_gradient():
    """They come from the policy, too, which must not learn to make its losses count less."""
    weights = [torch.zeros(5, requires_grad=True) for _ in range(2)]
    logps = LOGPS.clone().requires_grad_()
    named = dict(zip(("chosen_log_weights", "rejected_log_weights"), weights, strict=True))
    loss = preference_loss(*logps, use_weighting=True, **named).sum()
    assert torch.autograd.grad(loss, [logps, *weights], allow_unused=True)[1:] == (None, None)


def test_r_dpo_needs_lengths():
    with pytest.raises(ValueError, match=r"length_alpha=0.1\).*Pass chosen_lengths"):
        preference_loss(*LOGPS, length_alpha=0.1)


def test_losses_of_unpaired_records_go_elsewhere():
    with pytest.raises(
        ValueError, match=r"loss_type='kto'\): must be a loss of pairs.*unpaired_loss"
    ):
        preference_loss(*LOGPS, loss_type="kto")


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", "sft"])
def test_a_loss_of_the_batch_leaves_out_pairs_that_are_none(loss_type):
    sides = [
        CompletionScores(LOGPS[side], LOGPS[side + 2], torch.tensor([1, 2, 3, 4, 5]))
        for side in (0, 1)
    ]
    options, counted = PreferenceOptions(loss_type), torch.tensor([True, False, True, True, False])
    ours = pair_losses(PairScores(*sides), options, counted)
    alone = pair_losses(PairScores(*sides).take(counted), options)
    assert torch.equal(ours[counted], alone)
    assert ours[~counted].tolist() == [0, 0]
    assert torch.equal(
        pair_losses(PairScores(*sides), options, torch.ones(5).bool()),
        pair_losses(PairScores(*sides), options),
    )


def test_a_batch_without_any_pair_has_no_loss():
    """What a rank gets that is left without a pair."""
    nothing = CompletionScores(torch.zeros(2, requires_grad=True), torch.zeros(2), torch.zeros(2))
    for loss_type in ("aot", "sft"):
        options = PreferenceOptions(loss_type)
        losses = pair_losses(PairScores(nothing, nothing), options, torch.zeros(2).bool())
        assert losses.tolist() == [0, 0]
