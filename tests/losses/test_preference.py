import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from lightning_align.losses import LOSSES, check_preference_arguments, preference_loss
from lightning_align.losses.options import READS

SMOOTHED = {"label_smoothing": 0.1}
NEEDED = {"exo_pair": SMOOTHED}  # without which a loss cannot be had
MARGIN_LOSSES = [name for name, read in READS.items() if "f_divergence_type" in read]


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


def test_sigmoid_norm_is_sigmoid_of_means_over_tokens():
    """20 nats over 4 tokens and 6 over 3: 5 - 2 = 3 per token, odds of 3 : 1 by beta."""
    lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([3])}
    loss = pair_loss(20, 6, loss_type="sigmoid_norm", beta=math.log(3) / 3, **lengths)
    assert loss == pytest.approx(-math.log(3 / 4))
    assert pair_loss(3, 0, loss_type="sigmoid_norm", beta=math.log(3) / 3) == pytest.approx(loss)


@pytest.mark.parametrize("margin", [-2.0, 0.0, 3.0])
def test_robust_is_the_clean_loss_in_the_mean_over_flips(margin):
    """A label is right with 0.8 and flipped with 0.2: 0.8 L(m) + 0.2 L(-m) = -log sigmoid(m)."""
    options = {"loss_type": "robust", "beta": 1.0, "label_smoothing": 0.2}
    mean = 0.8 * pair_loss(margin, 0, **options) + 0.2 * pair_loss(0, margin, **options)
    assert mean == pytest.approx(pair_loss(margin, 0, beta=1.0))


def test_exo_is_a_divergence_that_vanishes_at_the_labels():
    """KL((p, 1-p) || (1-s, s)) with s = 1/4 is 0 at p = 3/4."""
    options = {"loss_type": "exo_pair", "beta": 1.0, "label_smoothing": 0.25}
    assert pair_loss(math.log(3), 0, **options) == pytest.approx(0, abs=1e-15)
    at_half = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert pair_loss(0, 0, **options) == pytest.approx(at_half)


def test_discopop_mixes_both_losses_by_the_margin():
    """At 0 half of each: (log 2 + 1) / 2. At odds of 3 : 1 1/4 of -log(3/4), 3/4 of 1/3."""
    assert pair_loss(0, 0, loss_type="discopop") == pytest.approx((math.log(2) + 1) / 2)
    loss = pair_loss(math.log(3), 0, loss_type="discopop", beta=1.0, discopop_tau=1.0)
    assert loss == pytest.approx(-math.log(3 / 4) / 4 + 3 / 4 / 3)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # The chosen reward is log 3 and the rejected one -log 3, whose sigmoids are 3/4 and 1/4.
        ("nca_pair", -math.log(3 / 4) - 0.5 * math.log(1 / 4) - 0.5 * math.log(3 / 4)),
        ("bco_pair", -2 * math.log(3 / 4)),
        ("apo_zero", 1 / 4 + 1 / 4),
        ("apo_down", 3 / 4 + 1 / 10),  # sigmoid(-2 log 3) = 1 / (1 + 9)
        ("sppo_hard", 2 * (math.log(3) - 1 / 2) ** 2),
    ],
)
def test_losses_of_both_rewards(loss_type, expected):
    loss = pair_loss(math.log(3), -math.log(3), loss_type=loss_type, beta=1.0)
    assert loss == pytest.approx(expected)


def test_sppo_wants_half_the_inverse_beta_on_both_sides():
    assert pair_loss(5, -5, loss_type="sppo_hard", beta=0.1) == 0


def batch_losses(chosen, rejected, ref_chosen=None, ref_rejected=None, **options):
    zeros = [0.0] * len(chosen)
    columns = (chosen, rejected, ref_chosen or zeros, ref_rejected or zeros)
    as_tensors = [torch.tensor(column, dtype=torch.float64) for column in columns]
    return preference_loss(*as_tensors, beta=1.0, **options).tolist()


def test_aot_compares_margins_of_the_same_rank():
    """Margins of the policy 3 and 1, of the reference 0 and 2: sorted 1 - 0 and 3 - 2.

    Both are 1, and not 3 and -1, so both losses are -log sigmoid(1).
    """
    losses = batch_losses([3.0, 1.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0], loss_type="aot")
    assert losses == pytest.approx(2 * [math.log1p(math.exp(-1))])


def test_aot_unpaired_compares_rewards_of_the_same_rank():
    """Chosen 3 and 1, rejected 0 and 2: again both differences are 1."""
    losses = batch_losses([3.0, 1.0], [0.0, 2.0], loss_type="aot_unpaired")
    assert losses == pytest.approx(2 * [math.log1p(math.exp(-1))])


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_of_a_single_pair_aot_is_cdpo(loss_type):
    options = {"beta": 0.3, "label_smoothing": 0.2}
    expected = pair_loss(4, 1, loss_type="cdpo", **options)
    assert pair_loss(4, 1, loss_type=loss_type, **options) == pytest.approx(expected)


def test_sft_is_a_mean_over_tokens_or_over_pairs():
    """6 nats over 2 tokens and 1 over 1: 7 / 3 of a token, or 3 and 1 of the pairs."""
    chosen, rejected = torch.tensor([-6.0, -1.0]), torch.tensor([-9.0, -9.0])
    lengths = {"chosen_lengths": torch.tensor([2, 1]), "rejected_lengths": torch.tensor([9, 9])}
    tokens = preference_loss(chosen, rejected, loss_type="sft", **lengths)
    assert tokens.tolist() == pytest.approx([7 / 3, 7 / 3])
    pairs = preference_loss(chosen, rejected, loss_type="sft", sft_mean="pairs", **lengths)
    assert pairs.tolist() == [3, 1]
    without = preference_loss(chosen, rejected, loss_type="sft")
    assert without.tolist() == [3.5, 3.5]  # values count as they are: 6 and 1


def test_cpo_is_sigmoid_of_log_probabilities():
    assert pair_loss(math.log(3), 0, loss_type="cpo", beta=1.0) == pytest.approx(-math.log(3 / 4))
    with_reference = preference_loss(*torch.tensor([[1.0], [0.0], [9.0], [-9.0]]), loss_type="cpo")
    assert torch.equal(
        with_reference, preference_loss(*torch.tensor([[1.0], [0.0]]), loss_type="cpo")
    )


def test_simpo_wants_its_margin_per_token():
    """-8 over 4 tokens and -15 over 3: 3 per token, which is what gamma asks for, so log 2."""
    lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([3])}
    loss = pair_loss(-8, -15, loss_type="simpo", beta=1.0, simpo_gamma=3.0, **lengths)
    assert loss == pytest.approx(math.log(2))


def test_alphapo_rewards_a_power_of_the_probability():
    """With alpha 1 the reward is 1 - 1 / p: -1 of p = 1/2 and -3 of p = 1/4; beta log(3) / 2."""
    options = {"loss_type": "alphapo", "beta": math.log(3) / 2, "simpo_gamma": 0.0}
    loss = pair_loss(math.log(1 / 2), math.log(1 / 4), alphapo_alpha=1.0, **options)
    assert loss == pytest.approx(-math.log(3 / 4))
    near = pair_loss(-1, -2, alphapo_alpha=1e-7, **options)
    options |= {"loss_type": "simpo"}
    assert near == pytest.approx(pair_loss(-1, -2, **options), rel=1e-6)
    assert pair_loss(-1, -2, alphapo_alpha=0.0, **options) == pair_loss(-1, -2, **options)


def test_orpo_is_of_the_odds_of_a_token():
    """Per token 3/4 and 1/2 have the odds 3 and 1: -lambda log sigmoid(log 3)."""
    lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([5])}
    chosen, rejected = 2 * math.log(3 / 4), 5 * math.log(1 / 2)
    loss = pair_loss(chosen, rejected, loss_type="orpo", beta=0.3, **lengths)
    assert loss == pytest.approx(-0.3 * math.log(3 / 4))


@pytest.mark.parametrize("loss_type", MARGIN_LOSSES)
def test_r_dpo_adds_a_reward_for_each_token_more(loss_type):
    """2 tokens more at alpha 0.25 and beta 0.5 are a margin of 1 more."""
    options = {"loss_type": loss_type, "beta": 0.5} | NEEDED.get(loss_type, {})
    lengths = {"chosen_lengths": torch.tensor([3]), "rejected_lengths": torch.tensor([1])}
    ours = pair_loss(3, 0, length_alpha=0.25, **options, **lengths)
    if "lengths" in READS[loss_type]:  # of means, so that 3 nats over 3 tokens are 1
        assert ours == pytest.approx(pair_loss(2, 0, **options))
    else:
        assert ours == pytest.approx(pair_loss(4, 0, **options))


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("margin", [-1e4, -90.0, 0.0, 90.0, 1e4])
def test_huge_margins_have_finite_losses_and_gradients(loss_type, margin):
    """-log(sigmoid(-90)) written down literally is infinite in fp32, and its gradient nan."""
    chosen, rejected = (torch.tensor([margin * side], requires_grad=True) for side in (0.5, -0.5))
    zero = torch.zeros(1)
    options = {"label_smoothing": 0.1} if "label_smoothing" in READS[loss_type] else {}
    loss = preference_loss(chosen, rejected, zero, zero, loss_type=loss_type, beta=1.0, **options)
    gradients = torch.autograd.grad(loss.sum(), [chosen, rejected], materialize_grads=True)
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if loss_type == "sigmoid":
        assert loss.item() == pytest.approx(float(F.softplus(torch.tensor(-margin))), abs=1e-30)


def test_a_certain_token_has_finite_odds():
    """p = 1 has infinite ones; the loss and its gradient stay finite."""
    for chosen, rejected in [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)]:
        logps = torch.tensor([[chosen], [rejected]], requires_grad=True)
        loss = preference_loss(*logps, loss_type="orpo")
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(logps.grad).all()


nats = st.floats(-50, 50)


@pytest.mark.parametrize("loss_type", [*MARGIN_LOSSES, "aot", "cpo", "simpo"])
@settings(max_examples=30, deadline=None)
@given(logps=st.lists(nats, min_size=4, max_size=4), shift=nats, beta=st.floats(0.01, 2))
def test_what_the_reference_takes_away_cancels(loss_type, logps, shift, beta):
    """A prompt's normaliser, which is the same for both completions, never matters."""
    options = {"loss_type": loss_type, "beta": beta} | NEEDED.get(loss_type, {})
    before = [torch.tensor([value], dtype=torch.float64) for value in logps]
    after = [before[0] + shift, before[1] + shift, before[2], before[3]]
    torch.testing.assert_close(
        preference_loss(*before, **options),
        preference_loss(*after, **options),
        rtol=1e-9,
        atol=1e-9,
    )


RISING = sorted(set(LOSSES) - {"apo_down", "exo_pair", "ipo", "nca_pair", "sft", "sppo_hard"})


@pytest.mark.parametrize("loss_type", RISING)
@settings(max_examples=8, deadline=None)
@given(logps=st.lists(st.floats(-20, -0.1), min_size=4, max_size=4), beta=st.floats(0.01, 2))
def test_no_loss_prefers_the_rejected_completion(loss_type, logps, beta):
    """More of the chosen and less of the rejected text never costs; others have a target."""
    leaves = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in logps]
    loss = preference_loss(*leaves, loss_type=loss_type, beta=beta, alphapo_alpha=0.1)
    chosen, rejected = torch.autograd.grad(loss.sum(), leaves[:2])
    if loss_type != "discopop":  # whose valley beside zero its authors show
        assert chosen.item() <= 0
        assert rejected.item() >= 0
    assert not torch.isnan(chosen + rejected)


@pytest.mark.parametrize("loss_type", LOSSES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**16), order=st.permutations(range(4)))
def test_the_order_of_a_batch_does_not_matter(loss_type, seed, order):
    """Losses go with their pairs; those of a whole batch may go to others, with the same mean."""
    generator = torch.Generator().manual_seed(seed)
    logps = -5 * torch.rand(4, 4, dtype=torch.float64, generator=generator)
    options = {"loss_type": loss_type} | NEEDED.get(loss_type, {})
    one, other = preference_loss(*logps, **options), preference_loss(*logps[:, order], **options)
    if loss_type in ("aot", "aot_unpaired"):
        one, other = one.sort().values, other.sort().values
    else:
        one = one[list(order)]
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss_type": "dpo"},
            r"loss_type='dpo'\): must be one of 'alphapo', .*nearest is 'cdpo'",
        ),
        ({"beta": 0.0}, r"beta=0.0\): must be positive and finite"),
        ({"beta": -0.1}, r"beta=-0.1\): must be positive"),
        ({"beta": math.nan}, r"beta=nan\): must be positive"),
        ({"beta": math.inf}, r"beta=inf\): must be positive"),
        ({"loss_type": "cdpo", "label_smoothing": 0.5}, r"smoothing=0.5\): must be in \[0, 0.5\)"),
        ({"loss_type": "cdpo", "label_smoothing": -0.1}, r"smoothing=-0.1\): must be in"),
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
        ({"label_smoothing": 0.1}, r"must be 0 with loss_type='sigmoid'.*Use .*'cdpo'"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "must be 0 with loss_type='ipo'"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused_for_a_module_alone(options, message):
    assert torch.isfinite(preference_loss(*torch.zeros(4, 2), **options)).all()
    arguments = {"loss_type": "sigmoid", "beta": 0.1} | options
    with pytest.raises(ValueError, match=f"DPOModule.*{message}"):
        check_preference_arguments("DPOModule", **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chosen_lengths": torch.ones(2)}, r"rejected_lengths=None\): both lengths"),
        ({"rejected_lengths": torch.ones(2)}, r"\(chosen_lengths=None\): both lengths"),
        (
            {"chosen_lengths": torch.ones(3), "rejected_lengths": torch.ones(3)},
            r"chosen_lengths.shape=\(3,\)\): must be one for each pair",
        ),
    ],
)
def test_lengths_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(*torch.zeros(4, 2), **options)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_lengths_describe_the_data_and_are_taken_by_every_loss(loss_type):
    logps = -torch.rand(4, 3)
    lengths = {"chosen_lengths": torch.tensor([2, 3, 4]), "rejected_lengths": torch.ones(3)}
    options = {"loss_type": loss_type} | NEEDED.get(loss_type, {})
    with_lengths = preference_loss(*logps, **options, **lengths)
    same = torch.equal(with_lengths, preference_loss(*logps, **options))
    assert same == ("lengths" not in READS[loss_type])


def test_log_probabilities_that_would_broadcast_are_refused():
    """(2,) against (2, 1) gives 2 x 2 differences, half of them between strangers."""
    logps = torch.zeros(2)
    message = r"preference_loss\(ref_chosen_logps.shape=\(2, 1\)\): must be one for each pair"
    with pytest.raises(ValueError, match=message):
        preference_loss(logps, logps, logps[:, None], logps)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [2, 3])
def test_reference_values_that_are_not_finite_are_refused(side, value):
    """Of losses that ask for none they are not looked at."""
    logps = torch.zeros(4, 2)
    logps[side, 1] = value
    name = ("ref_chosen_logps", "ref_rejected_logps")[side - 2]
    with pytest.raises(
        ValueError, match=rf"preference_loss\({name}=\[0.0, -?\w+\]\): must be fini"
    ):
        preference_loss(*logps)
    assert torch.isfinite(preference_loss(*logps, loss_type="cpo")).all()
