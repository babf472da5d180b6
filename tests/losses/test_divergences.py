"""f'(u) of each f-divergence from log u: known values, limits, and where u would overflow."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.losses import preference_loss
from lightning_align.losses.divergences import DIVERGENCES, bounded_expm1


def reward(name, ratio, alpha=0.5):
    logratio = torch.tensor([math.log(ratio)], dtype=torch.float64)
    return DIVERGENCES[name](logratio, alpha).item()


def test_derivatives_at_a_ratio_of_two():
    """log 2; 1 - 1/2; log(4/3); (2^(a-1) - 1) / (a - 1), which is 1 with a = 2, 1/2 with a = 0."""
    assert reward("reverse_kl", 2) == pytest.approx(math.log(2))
    assert reward("forward_kl", 2) == pytest.approx(1 / 2)
    assert reward("js_divergence", 2) == pytest.approx(math.log(4 / 3))
    assert reward("alpha_divergence", 2, alpha=2.0) == pytest.approx(1)
    assert reward("alpha_divergence", 2, alpha=0.0) == pytest.approx(1 / 2)  # is forward_kl
    assert reward("alpha_divergence", 4, alpha=0.5) == pytest.approx(1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_reward_where_policy_and_reference_agree(name):
    assert reward(name, 1) == pytest.approx(0, abs=1e-15)


def test_alpha_tends_to_reverse_kl():
    assert reward("alpha_divergence", 5, alpha=1.0) == pytest.approx(math.log(5))
    assert reward("alpha_divergence", 5, alpha=1 + 1e-5) == pytest.approx(math.log(5), rel=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
@settings(max_examples=20, deadline=None)
@given(low=st.floats(-40, 40), step=st.floats(0.01, 40))
def test_rewards_rise_with_the_ratio(name, low, step):
    pair = torch.tensor([low, low + step], dtype=torch.float64)
    smaller, larger = DIVERGENCES[name](pair, 0.5).tolist()
    assert larger >= smaller


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_ratios_that_overflow_have_finite_losses_and_gradients(name, dtype):
    chosen = torch.tensor([-1e4, -1e4, 1e4], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(3, dtype=dtype)
    # In fp16 e^11 is the largest that fits, and not its double.
    for alpha in (2.0,) if dtype == torch.float16 else (0.5, 2.0):
        loss = preference_loss(
            chosen,
            torch.tensor([0.0, -1e4, -1e4], dtype=dtype),
            zeros,
            zeros,
            f_divergence_type=name,
            f_alpha_divergence_coef=alpha,
        )
        (gradient,) = torch.autograd.grad(loss.sum(), chosen)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()


def test_small_exponents_are_exact():
    """exp(1e-6) - 1 written down literally has four digits in fp32."""
    assert bounded_expm1(torch.tensor(1e-6)).item() == pytest.approx(1.0000005e-6, rel=1e-6)
