"""GaLore's step of AdamW written out, and its moments in a new basis."""

import math

import pytest
import torch

from lightning_align.optimizers.galore_adamw import adam_direction, galore_adamw_, rotate_moments_
from lightning_align.optimizers.projection import Basis, project_back


@pytest.mark.parametrize("decay", [0.0, 0.2, 2.0])
def test_steps_are_those_of_the_old_transformers(decay):
    """eps before bias correction, decay of the weight after the step; at lr x decay = 1, too."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator).double() for s in ((3, 4), (5,))]
    states = [{"exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)} for w in weights]
    expected = [w.clone() for w in weights]
    means, seconds = [0, 0], [0, 0]
    for step in range(1, 5):
        gradients = [torch.randn(w.shape, generator=generator).double() for w in weights]
        for state in states:
            state["step"] = torch.tensor(float(step))
        options = {"lr": 0.5, "betas": (0.8, 0.95), "eps": 0.1, "weight_decay": decay}
        galore_adamw_(weights, gradients, states, **options)
        for i, gradient in enumerate(gradients):
            means[i] = 0.8 * means[i] + 0.2 * gradient
            seconds[i] = 0.95 * seconds[i] + 0.05 * gradient**2
            size = 0.5 * math.sqrt(1 - 0.95**step) / (1 - 0.8**step)
            expected[i] = expected[i] - size * means[i] / (seconds[i].sqrt() + 0.1)
            expected[i] = expected[i] - 0.5 * decay * expected[i]
            torch.testing.assert_close(weights[i], expected[i], atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(states[i]["exp_avg"], means[i])
            torch.testing.assert_close(states[i]["exp_avg_sq"], seconds[i])
            assert states[i]["step"] == step  # the caller counts


def moments(*shape):
    generator = torch.Generator().manual_seed(0)
    second = torch.rand(shape, generator=generator) + 1
    return {
        "step": torch.tensor(7.0),
        "exp_avg": torch.randn(shape, generator=generator) / 10,
        "exp_avg_sq": second / 100,
    }


def orthonormal(rows, cols, seed=0):
    drawn = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn)[0]


@pytest.mark.parametrize("sides", [("left",), ("right",), ("left", "right")])
def test_within_the_same_span_the_first_moment_is_the_same_matrix(sides):
    lengths = {"left": 8, "right": 12}
    old = Basis(**{side: orthonormal(lengths[side], 3) for side in sides})
    new = Basis(**{side: getattr(old, side) @ orthonormal(3, 3, seed=1) for side in sides})
    state = moments(*(3 if side in sides else length for side, length in lengths.items()))
    expected = project_back(state["exp_avg"], old)
    rotate_moments_(state, old, new, (0.9, 0.999))
    torch.testing.assert_close(project_back(state["exp_avg"], new), expected)
    assert (state["exp_avg_sq"] > 0).all()


def test_vectors_that_change_places_take_their_second_moments_along():
    old = Basis(right=orthonormal(12, 3))
    state = moments(8, 3)
    expected = state["exp_avg_sq"][:, [2, 0, 1]]
    rotate_moments_(state, old, Basis(right=old.right[:, [2, 0, 1]]), (0.9, 0.999))
    torch.testing.assert_close(state["exp_avg_sq"], expected)


def test_a_direction_never_seen_gets_the_mean_second_moment_and_no_first():
    """The axes 0 and 1 make place for 0 and 2: of axis 2 nothing is known."""
    axes = torch.eye(4)
    state = moments(2, 5)
    mean = state["exp_avg_sq"].mean(0)
    rotate_moments_(state, Basis(left=axes[:, :2]), Basis(left=axes[:, [0, 2]]), (0.9, 0.999))
    torch.testing.assert_close(state["exp_avg"][1], torch.zeros(5))
    torch.testing.assert_close(state["exp_avg_sq"][1], mean)


def test_the_variance_of_a_sum_is_that_of_its_parts():
    """(x + y) / sqrt 2 of means 1 and 3, second moments 2 and 10: mean 4 / sqrt 2, variance 1."""
    state = {
        "step": torch.tensor(1000.0),  # bias corrections of 1, to 1e-5
        "exp_avg": torch.tensor([[1.0], [3.0]]),
        "exp_avg_sq": torch.tensor([[2.0], [10.0]]),
    }
    diagonal = torch.tensor([[1.0], [1.0]]) / math.sqrt(2)
    rotate_moments_(state, Basis(left=torch.eye(2)), Basis(left=diagonal), (0.9, 0.9))
    torch.testing.assert_close(state["exp_avg"], torch.tensor([[4 / math.sqrt(2)]]))
    torch.testing.assert_close(state["exp_avg_sq"], torch.tensor([[8.0 + 1.0]]))


def test_the_direction_is_adam_with_eps_before_the_correction():
    state = moments(3, 4)
    state["exp_avg"].zero_()
    state["exp_avg_sq"].zero_()
    state["step"] = torch.tensor(1.0)
    direction = adam_direction(torch.full((3, 4), 2.0), state, (0.9, 0.999), eps=1.0)
    # m = 0.2, v = 0.004: -0.2 / (sqrt 0.004 + 1) * sqrt 0.001 / 0.1
    expected = -0.2 / (math.sqrt(0.004) + 1) * math.sqrt(0.001) / 0.1
    torch.testing.assert_close(direction, torch.full((3, 4), expected))


def test_no_variance_is_negative():
    """A mean whose square is above the second moment, as rounding makes it."""
    state = moments(3, 3)
    state["exp_avg_sq"].fill_(1e-30)
    rotate_moments_(state, Basis(left=torch.eye(3)), Basis(left=orthonormal(3, 3)), (0.9, 0.999))
    assert (state["exp_avg_sq"] >= 0).all()
    assert state["exp_avg_sq"].isfinite().all()
