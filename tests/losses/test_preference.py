import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.losses import LOSSES, check_preference_arguments, preference_loss


def pair_loss(chosen, rejected, **options):
    """Loss of one pair whose reference is indifferent: the logps are the log-ratios."""
    as_tensor = [torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected, 0, 0)]
    return preference_loss(*as_tensor, **options).item()


@pytest.mark.parametrize(("margin", "probability"), [(0, 1 / 2), (math.log(3), 3 / 4)])
def test_sigmoid_is_the_log_of_the_preference_probability(margin, probability):
    """With beta 1 and margin log 3 the odds are 3 : 1, so the loss is -log(3/4)."""
    assert pair_loss(margin, 0, beta=1.0) == pytest.approx(-math.log(probability))
    # beta scales the margin: half the margin at twice the beta is the same.
    assert pair_loss(margin / 2, 0, beta=2.0) == pytest.approx(-math.log(probability))


@pytest.mark.parametrize(("margin", "expected"), [(-2, 1.2), (0, 1), (5, 0.5), (10, 0), (30, 0)])
def test_hinge_is_zero_from_a_reward_margin_of_one(margin, expected):
    """With beta 0.1 the margin to reach is 10; below it the loss is 1 - margin / 10."""
    assert pair_loss(margin, 0, loss_type="hinge", beta=0.1) == pytest.approx(expected)


def test_ipo_wants_a_margin_of_half_the_inverse_beta():
    """With beta 0.1 the target is 5: a margin of 5 costs nothing, 3 and 7 cost 4."""
    losses = [pair_loss(margin, 0, loss_type="ipo", beta=0.1) for margin in (3, 5, 7)]
    assert losses == pytest.approx([4, 0, 4])


def test_ipo_with_lengths_compares_means_over_tokens():
    """20 nats over 4 tokens and 6 over 3 are means of 5 and 2; the target with beta 1/4 is 2.

    (5 - 2 - 2)^2 = 1, while the sums would give (20 - 6 - 2)^2 = 144.
    """
    lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([3])}
    assert pair_loss(20, 6, loss_type="ipo", beta=0.25) == pytest.approx(144)
    assert pair_loss(20, 6, loss_type="ipo", beta=0.25, **lengths) == pytest.approx(1)


def test_ipo_takes_an_empty_completion_as_one_token_not_as_nan():
    lengths = {"chosen_lengths": torch.tensor([0]), "rejected_lengths": torch.tensor([3])}
    assert pair_loss(0, 0, loss_type="ipo", beta=0.5, **lengths) == pytest.approx(1)


def test_cdpo_is_least_where_the_probability_is_the_label():
    """d/dm [-(1-s) log sig(m) - s log sig(-m)] = sig(m) - (1 - s): zero at sig(m) = 1 - s.

    With s = 1/4 that is a margin of log 3, and the loss there is the entropy of (3/4, 1/4).
    """
    margin = torch.tensor([math.log(3)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    loss = preference_loss(
        margin, zero, zero, zero, loss_type="cdpo", beta=1.0, label_smoothing=0.25
    )
    loss.sum().backward()
    assert loss.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert margin.grad.item() == pytest.approx(0, abs=1e-15)


def test_cdpo_without_smoothing_is_sigmoid():
    logps = torch.randn(4, 20)
    ours = preference_loss(*logps, loss_type="cdpo", beta=0.3)
    assert torch.equal(ours, preference_loss(*logps, loss_type="sigmoid", beta=0.3))


@pytest.mark.parametrize("loss_type", ["sigmoid", "cdpo"])
@pytest.mark.parametrize("margin", [-1e4, -90.0, 90.0, 1e4])
def test_huge_margins_have_finite_losses_and_gradients(loss_type, margin):
    """-log(sigmoid(-90)) written down literally is infinite in fp32, and its gradient nan."""
    chosen = torch.tensor([margin], requires_grad=True)
    zero = torch.zeros(1)
    options = {"label_smoothing": 0.1} if loss_type == "cdpo" else {}
    loss = preference_loss(chosen, zero, zero, zero, loss_type=loss_type, beta=1.0, **options)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(chosen.grad).all()
    if loss_type == "sigmoid":
        assert loss.item() == pytest.approx(max(0.0, -margin), abs=1e-30)


nats = st.floats(-50, 50)


@pytest.mark.parametrize("loss_type", LOSSES)
@settings(max_examples=30, deadline=None)
@given(logps=st.lists(nats, min_size=4, max_size=4), shift=nats, beta=st.floats(0.01, 2))
def test_what_the_reference_takes_away_cancels(loss_type, logps, shift, beta):
    """A prompt's normaliser, which is the same for both completions, never matters."""
    options = {"loss_type": loss_type, "beta": beta}
    before = [torch.tensor([value], dtype=torch.float64) for value in logps]
    after = [before[0] + shift, before[1] + shift, before[2], before[3]]
    torch.testing.assert_close(
        preference_loss(*before, **options),
        preference_loss(*after, **options),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, r"loss_type='dpo'\): must be one of 'cdpo', 'hinge', 'ipo', 'sig"),
        ({"beta": 0.0}, r"beta=0.0\): must be positive and finite"),
        ({"beta": -0.1}, r"beta=-0.1\): must be positive"),
        ({"beta": math.nan}, r"beta=nan\): must be positive"),
        ({"beta": math.inf}, r"beta=inf\): must be positive"),
        ({"loss_type": "cdpo", "label_smoothing": 0.5}, r"smoothing=0.5\): must be in \[0, 0.5\)"),
        ({"loss_type": "cdpo", "label_smoothing": -0.1}, r"smoothing=-0.1\): must be in"),
        ({"label_smoothing": 0.1}, r"must be 0 with loss_type='sigmoid'.*Use 'cdpo'"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "must be 0 with loss_type='ipo'"),
    ],
)
def test_bad_options_are_named(options, message):
    logps = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=f"preference_loss.*{message}"):
        preference_loss(*logps, **options)
    arguments = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0} | options
    with pytest.raises(ValueError, match=f"DPOModule.*{message}"):
        check_preference_arguments("DPOModule", **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chosen_lengths": torch.ones(2)}, r"rejected_lengths=None\): both lengths"),
        ({"rejected_lengths": torch.ones(2)}, r"\(chosen_lengths=None\): both lengths"),
        (
            {"chosen_lengths": torch.ones(2), "rejected_lengths": torch.ones(2)},
            "must be left out with loss_type='sigmoid'",
        ),
    ],
)
def test_lengths_are_never_ignored(options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(*torch.zeros(4, 2), **options)


def test_log_probabilities_that_would_broadcast_are_refused():
    """(2,) against (2, 1) gives 2 x 2 differences, half of them between strangers."""
    logps = torch.zeros(2)
    message = r"preference_loss\(ref_chosen_logps.shape=\(2, 1\)\): must be one for each pair"
    with pytest.raises(ValueError, match=message):
        preference_loss(logps, logps, logps[:, None], logps)
