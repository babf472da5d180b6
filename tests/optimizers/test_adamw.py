import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.optimizers.adamw import adamw_, init_adamw_state

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(6, 4), (3, 5, 2), (5,), (), (0, 3)]


def gradients_of(step: int, parameters: list[Any]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in parameters]


def parameters_of(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(99)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_matches_torch_adamw(dtype: torch.dtype) -> None:
    ours = parameters_of(dtype)
    states = [init_adamw_state(p) for p in ours]
    theirs = [nn.Parameter(p.clone()) for p in ours]
    optimizer = torch.optim.AdamW(theirs, **SETTINGS, fused=True)
    for step in range(10):
        gradients = gradients_of(step, ours)
        adamw_(ours, gradients, states, **SETTINGS)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert all(map(torch.equal, ours, theirs))  # the same kernel
    assert all(state["step"] == 10 for state in states)


def test_adamw_of_bf16_rounds_only_the_parameter() -> None:
    """With moments in fp32 a step of a bf16 parameter is the fp32 step, rounded once."""
    narrow = parameters_of(torch.bfloat16)
    states = [init_adamw_state(p) for p in narrow]
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}
    for step in range(5):
        gradients = gradients_of(step, narrow)
        wide, wide_states = [p.float() for p in narrow], copy.deepcopy(states)
        adamw_(wide, [g.float() for g in gradients], wide_states, **SETTINGS)
        adamw_(narrow, gradients, states, **SETTINGS)
        assert all(torch.equal(n, w.bfloat16()) for n, w in zip(narrow, wide, strict=True))
        for ours, theirs in zip(states, wide_states, strict=True):
            assert torch.equal(ours["exp_avg_sq"], theirs["exp_avg_sq"])


@pytest.mark.parametrize("layout", ["gradient", "moments", "parameter"])
def test_adamw_of_other_layouts_is_the_same_step(layout: str) -> None:
    """Fused kernels walk through memory and would pair the wrong elements."""
    plain = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    expected, expected_state = plain.clone(), init_adamw_state(plain)
    ours = torch.zeros(6, 8)[:, ::2].copy_(plain) if layout == "parameter" else plain.clone()
    state = init_adamw_state(ours)
    if layout == "moments":
        state = {name: value.t().contiguous().t() for name, value in state.items()}
    for step in range(3):
        (gradient,) = gradients_of(step, [plain])
        adamw_([expected], [gradient], [expected_state], **SETTINGS)
        other = gradient.t().contiguous().t() if layout == "gradient" else gradient
        adamw_([ours], [other], [state], **SETTINGS)
    # the unfused formula rounds differently
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["exp_avg_sq"], expected_state["exp_avg_sq"])


def test_adamw_takes_the_learning_rate_as_a_tensor() -> None:
    ours, theirs = parameters_of(), parameters_of()
    states, others = ([init_adamw_state(p) for p in ours] for _ in range(2))
    gradients = gradients_of(0, ours)
    adamw_(ours, gradients, states, **{**SETTINGS, "lr": torch.tensor(1e-2)})
    adamw_(theirs, gradients, others, **SETTINGS)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)  # 1e-2 in fp32 against fp64


def test_first_step_moves_every_element_by_the_learning_rate() -> None:
    """m / (1 - b1) = g and v / (1 - b2) = g^2 after one step, so the step is lr * sign(g)."""
    parameter = torch.tensor([1.0, -2.0])
    state = init_adamw_state(parameter)
    settings = {**SETTINGS, "weight_decay": 0.0, "eps": 0.0}
    adamw_([parameter], [torch.tensor([5.0, -0.1])], [state], **settings)
    torch.testing.assert_close(parameter, torch.tensor([0.99, -1.99]))
