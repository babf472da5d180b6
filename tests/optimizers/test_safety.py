import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import lightning_align
from lightning_align._compat.jsonargparse_parsing import class_paths
from lightning_align.optimizers.safety import (
    are_usable,
    begin_step,
    check_betas,
    check_eps,
    check_gradients,
    check_number,
    check_parameters,
    parameter_name,
    refuse_other_arithmetic,
    skipped_steps,
)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_are_usable_finds_one_element(value: float, dtype: torch.dtype) -> None:
    gradients = [torch.randn(4, 3).to(dtype), torch.randn(5).to(dtype), torch.zeros(0, 2)]
    assert are_usable(gradients)
    gradients[1][2] = value
    assert not are_usable(gradients)


def test_are_usable_up_to_a_norm_whose_square_is_a_number() -> None:
    """2 elements of 7e18 have a norm of 9.9e18; (1e30)^2 is infinite in fp32."""
    assert are_usable([torch.full((2,), 7e18)])
    assert not are_usable([torch.zeros(2), torch.full((2,), 7.1e18)])
    assert not are_usable([torch.full((3,), 1e30), torch.zeros(2)])
    assert are_usable([torch.full((2,), 7e18), torch.full((2,), 7e18)])  # none alone exceeds it
    assert are_usable([torch.full((3,), 6e4, dtype=torch.float16)])  # a norm beyond fp16
    assert are_usable([])


def test_a_norm_that_is_too_large_is_told_from_what_is_not_finite() -> None:
    optimizer = optimizer_of(first=(2, 2), second=(3,))
    optimizer.defaults["on_nonfinite"] = "skip"
    optimizer.param_groups[1]["params"][0].grad[0] = 2e19
    found = "parameter 'second' has a norm above 1e\\+19, whose square is no fp32 number"
    with pytest.warns(UserWarning, match=found):
        assert not begin_step(optimizer)
    assert skipped_steps(optimizer) == 1


def optimizer_of(**names: tuple[int, ...]) -> torch.optim.Optimizer:
    """An AdamW of named parameters, one group for each, with gradients of ones."""
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in names.items()}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    return torch.optim.AdamW([{"params": [item]} for item in parameters.items()])


def test_skip_counts_and_warns_once_with_name_and_step() -> None:
    optimizer = optimizer_of(first=(2, 2), second=(3,))
    optimizer.defaults["on_nonfinite"] = "skip"
    assert begin_step(optimizer)
    optimizer.param_groups[1]["params"][0].grad[0] = float("nan")
    found = "AdamW: at step 2 the gradient of parameter 'second' is not finite"
    with pytest.warns(UserWarning, match=found):
        assert not begin_step(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not begin_step(optimizer)
    assert skipped_steps(optimizer) == 2
    other = optimizer_of(first=(2, 2), second=(3,))
    other.load_state_dict(optimizer.state_dict())
    assert skipped_steps(other) == 2


def test_raise_names_parameter_and_step_and_counts_nothing() -> None:
    optimizer = optimizer_of(first=(2, 2), second=(3,))
    optimizer.defaults["on_nonfinite"] = "raise"
    begin_step(optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[1]["params"][0].grad[0] = -float("inf")
    rule = r"AdamW: at step 2 the gradient of parameter 'second' is not finite\. Nothing"
    with pytest.raises(FloatingPointError, match=rule):
        begin_step(optimizer)
    assert optimizer.state_dict() == before


def test_check_gradients_leaves_out_none_and_refuses_sparse() -> None:
    optimizer = optimizer_of(first=(2, 2), second=(3,))
    optimizer.param_groups[0]["params"][0].grad = None
    assert [g.shape for g in check_gradients(optimizer)] == [(3,)]
    optimizer.param_groups[0]["params"][0].grad = torch.eye(2).to_sparse()
    with pytest.raises(ValueError, match=r"AdamW\(params=\"'first'\"\): its gradient is sparse"):
        check_gradients(optimizer)


@pytest.mark.parametrize(
    "value",
    [
        -1e-3,
        math.nan,
        math.inf,
        1e19,
        pytest.param(10**400, id="10^400"),
        "1",
        None,
        True,
        torch.zeros(2),
    ],
)
def test_check_number_refuses(value: Any) -> None:
    with pytest.raises(ValueError, match=r"X\(lr=.*\): must be a number of at least 0, below 1e"):
        check_number("X", "lr", value)


def test_check_number_takes_its_bounds() -> None:
    check_number("X", "lr", torch.tensor(0.1))
    check_number("X", "lr", 0)
    check_number("X", "momentum", 0.95, high=1)
    with pytest.raises(ValueError, match=r"X\(eps=0\): must be a number above 0"):
        check_number("X", "eps", 0, above_low=True)
    with pytest.raises(ValueError, match=r"X\(momentum=1.0\): .* of at least 0, below 1"):
        check_number("X", "momentum", 1.0, high=1)


@pytest.mark.parametrize("betas", [(0.9,), 0.9, (0.9, 1.0), (-0.1, 0.9), ("a", 0.9), None])
def test_check_betas_refuses(betas: Any) -> None:
    with pytest.raises(ValueError, match=r"betas=.*two numbers of at least 0 and below 1"):
        check_betas("X", betas)
    check_betas("X", [0.9, 0.95])


def test_check_parameters_refuses_complex_and_twice() -> None:
    real, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    check_parameters("X", {"params": [real]})
    with pytest.raises(ValueError, match=r"number 1 of its group.*real floating-point.*complex64"):
        check_parameters("X", {"params": [real, other]})
    with pytest.raises(ValueError, match=r"'b'.*must be given once"):
        check_parameters("X", {"params": [real, real], "param_names": ["a", "b"]})


def test_parameter_name_without_names() -> None:
    group = {"params": [torch.zeros(2, 3)]}
    assert parameter_name(group, 0) == "number 0 of its group, of shape (2, 3)"


def test_check_eps_refuses_what_is_divided_by_when_a_second_moment_is_0() -> None:
    """(1 - beta2) g^2 is 0 in fp32 for g below 4e-23 / sqrt(1 - beta2)."""
    for eps, beta2 in ((1e-8, 0.999), (1e-18, 0.0), (1.1e-17, 0.99), (2e-10, 1 - 2**-53)):
        check_eps("X", "eps", eps, beta2)
    for eps, beta2 in ((0.0, 0.999), (1e-19, 0.0), (1e-18, 0.99), (1e-15, 1 - 2**-53)):
        with pytest.raises(ValueError, match=r"X\(eps=.*\): must be at least .* with beta2"):
            check_eps("X", "eps", eps, beta2)


@pytest.mark.parametrize(
    "asked",
    [
        {"maximize": True},
        {"amsgrad": True},
        {"differentiable": True},
        {"decoupled_weight_decay": False, "weight_decay": 0.1},
        {"weight_decouple": False, "weight_decay": 0.1},
    ],
)
def test_what_others_do_and_we_do_not_is_refused_by_name(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"X\({next(iter(asked))}=.*\): it would be ignored"):
        refuse_other_arithmetic("X", asked)
    computes_the_same = {"foreach": True, "fused": True, "capturable": True}
    refuse_other_arithmetic("X", {"decoupled_weight_decay": False, "weight_decay": 0.0})
    refuse_other_arithmetic("X", {"maximize": False, "weight_decay": 0.1, **computes_the_same})


def test_what_optimizers_share_is_no_choice_of_the_command_line() -> None:
    ours = {f"lightning_align.{name}" for name in ("GaLoreAdamW", "Muon", "StableAdamW")}
    assert all(getattr(lightning_align, path.rpartition(".")[2]) for path in ours)  # imported
    assert {path for path in class_paths(Optimizer) if path.startswith("lightning_align")} == ours
