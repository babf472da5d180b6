"""KTO and its relative: known values, the KL estimate, what counts, bad input."""

import math

import pytest
import torch

from lightning_align.losses import (
    CompletionLogps,
    PreferenceOptions,
    kl_estimate,
    unpaired_loss,
    unpaired_step,
)

LABELS = torch.tensor([True, False])


def test_apo_zero_unpaired_is_the_chance_of_the_other_label():
    """Rewards log 3 and -log 3 of a good and a bad completion: 1 - 3/4 and 1/4."""
    rewards = torch.tensor([math.log(3), -math.log(3)])
    losses = unpaired_loss(rewards, torch.zeros(2), LABELS, loss_type="apo_zero_unpaired", beta=1.0)
    assert losses.tolist() == pytest.approx([1 / 4, 1 / 4])


def test_kto_measures_from_the_kl():
    """A KL of log 2 takes rewards of log 6 and log 2 / 3 to log 3 and -log 3; weights 2 and 3."""
    logps = torch.tensor([math.log(6), math.log(2 / 3)])
    losses = unpaired_loss(
        logps,
        torch.zeros(2),
        LABELS,
        loss_type="kto",
        beta=1.0,
        kl_logps=torch.tensor([0.0, 2 * math.log(2)]),
        ref_kl_logps=torch.zeros(2),
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    assert losses.tolist() == pytest.approx([2 / 4, 3 / 4])


def test_the_kl_is_no_gradient_and_never_negative():
    logps = torch.tensor([-3.0, -1.0], requires_grad=True)
    assert kl_estimate(logps, torch.tensor([-1.0, -1.0])) == 0
    estimate = kl_estimate(logps, torch.tensor([-4.0, -4.0]))
    assert estimate == 2
    assert not estimate.requires_grad
    assert kl_estimate(torch.zeros(0), torch.zeros(0)) == 0


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_huge_rewards_have_finite_losses_and_gradients(loss_type, value):
    logps = torch.full((2,), value, requires_grad=True)
    zeros = torch.zeros(2)
    losses = unpaired_loss(
        logps, zeros, LABELS, loss_type=loss_type, kl_logps=zeros, ref_kl_logps=zeros
    )
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logps.grad).all()


def scored(logps, lengths, **changes):
    lengths, ones = torch.tensor(lengths), torch.ones(len(lengths))
    values = {"entropy_B": ones, "mean_logit_B": 2 * ones, "top1_B": ones} | changes
    return CompletionLogps(torch.tensor(logps), lengths, token_logps_BT=ones[:, None], **values)


def test_metrics_of_known_numbers():
    """Rewards 2 and 4 of good, -6 of a bad completion, and one record that is none."""
    policy = scored([-2.0, -1.0, -8.0, 0.0], [2, 3, 1, 0])
    reference = scored([-4.0, -5.0, -2.0, 0.0], [2, 3, 1, 0])
    labels = torch.tensor([1, 1, 0, 1])
    options = PreferenceOptions("kto", beta=1.0)
    losses, metrics = unpaired_step(policy, reference, labels, options, kl=torch.tensor(1.0))
    expected = [1 / (1 + math.exp(reward)) for reward in (2 - 1, 4 - 1, 6 + 1)]
    assert losses.tolist() == pytest.approx([*expected, 0])
    values = {name: mean.value.item() for name, mean in metrics.items()}
    assert values == pytest.approx(
        {
            "rewards/chosen": 3,
            "rewards/rejected": -6,
            "logps/chosen": -1.5,
            "logps/rejected": -8,
            "logits/chosen": 4 / 5,
            "logits/rejected": 2,
            "entropy": 4 / 6,
            "kl": 1,
        }
    )
    assert metrics["kl"].count == 3


def test_reference_free_rewards_are_log_probabilities():
    options = {"loss_type": "apo_zero_unpaired", "beta": 1.0, "reference_free": True}
    logps = torch.tensor([-math.log(3), -math.log(3)])
    assert unpaired_loss(logps, None, LABELS, **options).tolist() == pytest.approx([3 / 4, 1 / 4])
    losses, _ = unpaired_step(
        scored(logps.tolist(), [1, 1]), None, LABELS, PreferenceOptions(**options)
    )
    assert losses.tolist() == pytest.approx([3 / 4, 1 / 4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "sigmoid"}, r"loss_type='sigmoid'\): must be a loss of unpaired records"),
        ({"labels": torch.ones(2, 1)}, r"labels.shape=\(2, 1\)\): must be one for each record"),
        ({"ref_logps": torch.zeros(3)}, r"ref_logps.shape=\(3,\)\): must be one for each record"),
        ({"ref_logps": None}, r"ref_logps=None\): must be given.*reference_free=True"),
        ({"kl_logps": None}, r"kl_logps=None\): must be given with loss_type='kto'"),
        ({"ref_kl_logps": None}, r"ref_kl_logps=None\): must be given with loss_type='kto'"),
        ({"beta": 0.0}, r"beta=0.0\): must be positive"),
        ({"ref_logps": torch.tensor([0.0, math.nan])}, r"ref_logps=.*must be finite"),
        ({"ref_kl_logps": torch.tensor([-math.inf, 0.0])}, r"ref_kl_logps=.*must be finite"),
    ],
)
def test_bad_input_is_named(change, message):
    zeros = torch.zeros(2)
    arguments = {
        "logps": zeros,
        "ref_logps": zeros,
        "labels": LABELS,
        "loss_type": "kto",
        "kl_logps": zeros,
        "ref_kl_logps": zeros,
    }
    with pytest.raises(ValueError, match=rf"unpaired_loss\({message}"):
        unpaired_loss(**(arguments | change))


@pytest.mark.parametrize(
    ("labels", "reference", "message"),
    [
        (
            torch.ones(3),
            scored([-1.0, -1.0], [1, 1]),
            r"label.shape=\(3,\)\): must be one for each",
        ),
        (LABELS, None, r"reference=None\): must be given with loss_type='kto'"),
        (LABELS, scored([-1.0, math.nan], [1, 1]), r"reference.logps_B=.*must be finite"),
    ],
)
def test_a_step_refuses_what_does_not_fit(labels, reference, message):
    policy = scored([-1.0, -1.0], [1, 1])
    with pytest.raises(ValueError, match=rf"unpaired_step\({message}"):
        unpaired_step(policy, reference, labels, PreferenceOptions("kto"))
