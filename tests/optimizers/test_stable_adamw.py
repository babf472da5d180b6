import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.optimizers.adamw import init_adamw_state
from lightning_align.optimizers.stable_adamw import StableAdamW, update_rms

SHAPES = [(6, 4), (3, 5, 2), (5,), ()]
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def train(optimizer: Any, parameters: list[nn.Parameter], steps: range) -> list[Tensor]:
    """Gradients that grow tenfold in every third step, so that updates are clipped."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator) * 10 ** (step % 3)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.peer
def test_stable_adamw_matches_pytorch_optimizer() -> None:
    import pytorch_optimizer as peer

    ours, theirs = parameters_of(), parameters_of()
    train(StableAdamW(ours, **SETTINGS), ours, range(30))
    train(peer.StableAdamW(theirs, **SETTINGS), theirs, range(30))
    for our, their in zip(ours, theirs, strict=True):
        # they keep bias-corrected moments, which round differently
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)


def test_stable_adamw_matches_the_papers_algorithm() -> None:
    """arXiv:2304.13013, Algorithm 2, line by line in fp64."""
    lr, (beta1, beta2), eps, decay = 1e-2, (0.9, 0.95), 1e-8, 0.1
    ours = parameters_of(torch.float64)
    thetas = [parameter.detach().clone() for parameter in ours]
    v = [torch.zeros_like(theta) for theta in thetas]
    u = [torch.zeros_like(theta) for theta in thetas]
    optimizer = StableAdamW(ours, **SETTINGS)
    clipped = 0
    for t in range(1, 11):
        train(optimizer, ours, range(t, t + 1))
        beta1_hat = beta1 * (1 - beta1 ** (t - 1)) / (1 - beta1**t)
        beta2_hat = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
        for i, theta in enumerate(thetas):
            g: Any = ours[i].grad
            v[i] = beta1_hat * v[i] + (1 - beta1_hat) * g
            u[i] = beta2_hat * u[i] + (1 - beta2_hat) * g**2
            rms = (g**2 / u[i].clamp(min=eps**2)).mean().sqrt()
            clipped += bool(rms > 1)
            eta = lr / max(1, rms)
            thetas[i] = theta - eta * decay * theta - eta * v[i] / (u[i].sqrt() + eps)
    assert 5 < clipped < 35
    for our, their in zip(ours, thetas, strict=True):
        # the bias correction and the learning rate are 0-d tensors of fp32
        torch.testing.assert_close(our.detach(), their, rtol=0, atol=1e-7)


def test_rms_in_closed_form() -> None:
    """All elements g: u_1 = g^2, RMS 1. Then 3 g: u_2 = (b (1 - b) + 9 (1 - b)) g^2 / (1 - b^2).

    With b = 1/2: u_2 = (0.25 + 4.5) g^2 / 0.75 = 19/3 g^2, and RMS = 3 / sqrt(19/3) = 1.192.
    """
    parameter = torch.zeros(4)
    state = init_adamw_state(parameter)
    gradient = torch.full((4,), 0.7)
    assert update_rms(gradient, state, 0.5, 1e-8).item() == pytest.approx(1.0)
    state["step"].add_(1)
    state["exp_avg_sq"].copy_(0.5 * gradient**2)
    rms = update_rms(3 * gradient, state, 0.5, 1e-8).item()
    assert rms == pytest.approx(3 / math.sqrt(19 / 3))
    assert update_rms(torch.zeros(4), init_adamw_state(parameter), 0.0, 1e-8).item() == 0.0


def test_steady_gradients_are_adamws() -> None:
    """A constant gradient has RMS 1: nothing is clipped, up to rounding."""
    ours, theirs = parameters_of(), parameters_of()
    first, second = StableAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for _ in range(5):
        for our, their in zip(ours, theirs, strict=True):
            our.grad, their.grad = torch.ones_like(our), torch.ones_like(their)
        first.step()
        second.step()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-6)


def test_a_spike_moves_less_than_adamw() -> None:
    ours, theirs = parameters_of(), parameters_of()
    first = StableAdamW(ours, **SETTINGS)
    second = torch.optim.AdamW(theirs, **SETTINGS)
    for step in range(20):
        size = 1000.0 if step == 19 else 1.0
        before = ours[0].detach().clone(), theirs[0].detach().clone()
        for our, their in zip(ours, theirs, strict=True):
            our.grad, their.grad = torch.full_like(our, size), torch.full_like(their, size)
        first.step()
        second.step()
    # u = 0.05 * 1000^2 / (1 - 0.95^20): RMS = sqrt(0.64 / 0.05) = 3.6
    moves = (ours[0] - before[0]).norm(), (theirs[0] - before[1]).norm()
    assert 3 < (moves[1] / moves[0]).item() < 4


def test_a_run_of_adamw_goes_on_here() -> None:
    theirs = parameters_of()
    adamw = torch.optim.AdamW(theirs, **SETTINGS)
    train(adamw, theirs, range(3))
    resumed = StableAdamW(theirs)
    resumed.load_state_dict(adamw.state_dict())
    assert resumed.param_groups[0]["lr"] == 1e-2
    assert resumed.state[theirs[0]]["step"] == 3
    train(resumed, theirs, range(3, 5))


def test_step_of_one_parameter_is_its_part_of_the_whole_step() -> None:
    ours, theirs = parameters_of(), parameters_of()
    whole, parts = StableAdamW(ours), StableAdamW(theirs)
    for step in range(3):
        train(whole, ours, range(step, step + 1))
        for our, their in zip(ours, theirs, strict=True):
            their.grad = our.grad
            parts.step_param(their)
    assert all(map(torch.equal, ours, theirs))


def test_non_finite_gradient_is_skipped_and_counted() -> None:
    parameters = parameters_of()
    optimizer = StableAdamW([("a", parameters[0]), ("b", parameters[1])])
    before = train(optimizer, parameters, range(1))
    parameters[1].grad[0, 0, 0] = math.inf  # type: ignore[index]
    with pytest.warns(UserWarning, match="parameter 'b' is not finite"):
        optimizer.step()
    assert torch.equal(parameters[0], before[0])
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"lr": -1.0}, r"StableAdamW\(lr=-1.0\): must be a number of at least 0"),
        ({"eps": math.nan}, "eps=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        StableAdamW(parameters_of(), **settings)
    with pytest.raises(ValueError, match=rule):
        StableAdamW([{"params": parameters_of(), **settings}])


def test_a_parameter_of_two_groups_is_refused_by_name() -> None:
    group = {"params": [("w", parameters_of()[0])]}
    with pytest.raises(ValueError, match=r"StableAdamW\(params=\"'w'\"\): must be in one group"):
        StableAdamW([group, dict(group)])


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="real floating-point"):
        StableAdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
