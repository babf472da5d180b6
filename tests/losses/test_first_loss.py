"""The loss before the first step: closed forms, and how far a batch is from them."""

import math

import pytest
import torch

from lightning_align.losses import (
    LOSSES,
    CompletionLogps,
    PreferenceOptions,
    first_losses,
    theoretical_first_losses,
)

LOG2 = math.log(2)
BETA, SMOOTHING = 0.2, 0.1

# With all log-ratios 0, sigma(0) = 1/2.
THEORY = {
    "aot": LOG2,
    "aot_unpaired": LOG2,
    "apo_down": 1.0,  # 1/2 + 1/2
    "apo_zero": 1.0,
    "bco_pair": 2 * LOG2,
    "cdpo": LOG2,
    "discopop": LOG2 / 2 + 0.5,  # half of each term: s = sigma(0)
    "exo_pair": -LOG2 - math.log(SMOOTHING * (1 - SMOOTHING)) / 2,  # KL((1/2, 1/2) || (1-e, e))
    "hinge": 1.0,
    "ipo": 1 / (4 * BETA**2),
    "nca_pair": 2 * LOG2,
    "robust": LOG2,  # ((1 - e) - e) / (1 - 2 e) = 1
    "sigmoid": LOG2,
    "sigmoid_norm": LOG2,
    "sppo_hard": 1 / (2 * BETA**2),
}
SMOOTHED = ("aot", "aot_unpaired", "cdpo", "exo_pair", "robust")


def options(name, **others):
    smoothing = SMOOTHING if name in SMOOTHED else 0.0
    return PreferenceOptions(name, beta=BETA, label_smoothing=smoothing, **others)


LENGTHS = torch.tensor([3, 40]), torch.tensor([7, 2])


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_the_table_has_its_closed_form_or_none(name):
    found = theoretical_first_losses(options(name), *LENGTHS)
    if name not in THEORY:
        assert found == {}
        assert name in {"alphapo", "cpo", "orpo", "sft", "simpo"}
        return
    assert found.keys() == {name}
    assert found[name].tolist() == pytest.approx([THEORY[name]] * 2, rel=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_an_f_divergence_changes_nothing_where_the_models_agree(divergence):
    found = theoretical_first_losses(options("sigmoid", f_divergence_type=divergence), *LENGTHS)
    assert found["sigmoid"].tolist() == pytest.approx([LOG2] * 2)


def test_r_dpo_depends_on_the_lengths():
    """-log sigma(alpha (n_w - n_l)), differences of -4 and 38 tokens."""
    found = theoretical_first_losses(options("sigmoid", length_alpha=0.01), *LENGTHS)
    assert found["sigmoid"].tolist() == pytest.approx(
        [math.log1p(math.exp(0.04)), math.log1p(math.exp(-0.38))]
    )


def test_of_a_list_those_that_have_a_value_and_without_a_reference_none():
    listed = PreferenceOptions(["sigmoid", "sft", "apo_zero"], loss_weights=[1, 2, 3])
    assert [*theoretical_first_losses(listed, *LENGTHS)] == ["sigmoid", "apo_zero"]
    assert theoretical_first_losses(PreferenceOptions(reference_free=True), *LENGTHS) == {}


def scored(*logps):
    values = torch.tensor(logps)
    zeros, lengths = torch.zeros(len(logps)), torch.tensor([2] * len(logps))
    return CompletionLogps(values, lengths, zeros, zeros, zeros, values[:, None])


def test_equal_scores_have_no_deviation_and_errors_of_either_sign_do_not_cancel():
    """Margins of +2 and -2 at beta 1: the mean loss moves little, each pair's by about 0.7."""
    ours = scored(-10.0, -20.0, -30.0, -40.0)
    (exact,) = first_losses(ours, ours, PreferenceOptions(beta=1.0))
    assert (exact.loss, exact.theory) == pytest.approx((LOG2, LOG2))
    assert exact.deviation < 1e-7
    (off,) = first_losses(
        scored(-8.0, -22.0, -30.0, -40.0), ours, PreferenceOptions(beta=1.0, use_weighting=False)
    )
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert off.loss == pytest.approx((right + wrong) / 2)
    assert off.deviation == pytest.approx(((LOG2 - right) + (wrong - LOG2)) / 2)


def test_pairs_that_fill_a_batch_up_are_left_out():
    ours, theirs = scored(-1.0, -1.0, -3.0, -3.0), scored(-1.0, -5.0, -3.0, -3.0)
    (off,) = first_losses(ours, theirs, PreferenceOptions())
    assert off.deviation > 0.05
    lengths = torch.tensor([2, 0, 2, 0])
    filled = [each._replace(lengths_B=lengths) for each in (ours, theirs)]
    (right,) = first_losses(*filled, PreferenceOptions())
    assert right.deviation < 1e-7
    empty = [each._replace(lengths_B=0 * lengths) for each in (ours, theirs)]
    assert first_losses(*empty, PreferenceOptions()) == []
