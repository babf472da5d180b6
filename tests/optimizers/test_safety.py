import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.optimizers.safety import (
    all_finite,
    begin_step,
    check_betas,
    check_gradients,
    check_number,
    check_parameters,
    parameter_name,
    refuse_other_shapes,
    restore_dtypes,
    skipped_steps,
)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_finite_finds_one_element(value: float, dtype: torch.dtype) -> None:
    gradients = [torch.randn(4, 3).to(dtype), torch.randn(5).to(dtype), torch.zeros(0, 2)]
    assert all_finite(gradients)
    gradients[1][2] = value
    assert not all_finite(gradients)


def test_all_finite_of_gradients_whose_norm_overflows() -> None:
    """(1e30)^2 is infinite in fp32; the gradients are not."""
    assert all_finite([torch.full((3,), 1e30), torch.zeros(2)])
    assert all_finite([torch.full((3,), 6e4, dtype=torch.float16)])
    assert all_finite([])


def optimizer_of(**names: tuple[int, ...]) -> torch.optim.Optimizer:
    """An AdamW of named parameters, one group for each, with gradients of ones."""
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in names.items()}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    return torch.optim.AdamW([{"params": [item]} for item in parameters.items()])


def test_skip_counts_and_warns_once_with_name_and_step() -> None:
    optimizer = optimizer_of(first=(2, 2), second=(3,))
    optimizer.defaults["on_nonfinite"] = "skip"
    assert begin_step(optimizer, lambda: 5) == (5, True)
    optimizer.param_groups[1]["params"][0].grad[0] = float("nan")
    found = "AdamW: at step 2 the gradient of parameter 'second' is not finite"
    with pytest.warns(UserWarning, match=found):
        assert begin_step(optimizer, None) == (None, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert begin_step(optimizer, None) == (None, False)
    assert skipped_steps(optimizer) == 2
    other = optimizer_of(first=(2, 2), second=(3,))
    other.load_state_dict(optimizer.state_dict())
    assert skipped_steps(other) == 2


def test_raise_names_parameter_and_step_and_counts_nothing() -> None:
    optimizer = optimizer_of(first=(2, 2), second=(3,))
    optimizer.defaults["on_nonfinite"] = "raise"
    begin_step(optimizer, None)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[1]["params"][0].grad[0] = -float("inf")
    rule = r"AdamW: at step 2 the gradient of parameter 'second' is not finite\. Nothing"
    with pytest.raises(FloatingPointError, match=rule):
        begin_step(optimizer, None)
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
        pytest.param(10**400, id="10^400"),
        "1",
        None,
        True,
        torch.zeros(2),
    ],
)
def test_check_number_refuses(value: Any) -> None:
    with pytest.raises(ValueError, match=r"X\(lr=.*\): must be a number of at least 0 and finite"):
        check_number("X", "lr", value)


def test_check_number_takes_its_bounds() -> None:
    check_number("X", "lr", torch.tensor(0.1))
    check_number("X", "lr", 0)
    check_number("X", "momentum", 0.95, high=1)
    with pytest.raises(ValueError, match=r"X\(eps=0\): must be a number above 0"):
        check_number("X", "eps", 0, above_low=True)
    with pytest.raises(ValueError, match=r"X\(momentum=1.0\): .* of at least 0 and below 1"):
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


# States


def moments(_: Any, parameter: Tensor) -> dict[str, torch.Size]:
    shapes = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter.shape)
    return {"step": torch.Size(), **shapes}


def state_of(**names: tuple[int, ...]) -> dict[str, Any]:
    optimizer = optimizer_of(**names)
    optimizer.step()
    return optimizer.state_dict()


def test_refuse_other_shapes_takes_its_own() -> None:
    state = state_of(first=(2, 2), second=(3,))
    refuse_other_shapes(optimizer_of(first=(2, 2), second=(3,)), state, moments)
    del state["state"][0]  # a parameter that never had a gradient
    refuse_other_shapes(optimizer_of(first=(2, 2), second=(3,)), state, moments)


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        ({"first": (2, 2)}, r"groups must have \[1\] parameters, and they have \[1, 1\]"),
        ({"first": (2, 2), "other": (3,)}, "in the place of parameter 'other' it has 'second'"),
        ({"first": (2, 3), "second": (3,)}, r"parameter 'first' must hold .*\(2, 3\).*\(2, 2\)"),
    ],
)
def test_refuse_other_shapes_names_what_differs(names: Any, rule: str) -> None:
    state = state_of(first=(2, 2), second=(3,))
    with pytest.raises(ValueError, match=rf"AdamW.load_state_dict\(.*{rule}"):
        refuse_other_shapes(optimizer_of(**names), state, moments)


def test_refuse_other_shapes_notices_another_kind_of_state() -> None:
    state = state_of(first=(2, 2))
    state["state"][0]["momentum_buffer"] = state["state"][0].pop("exp_avg")
    with pytest.raises(ValueError, match="momentum_buffer"):
        refuse_other_shapes(optimizer_of(first=(2, 2)), state, moments)


def test_restore_dtypes_undoes_the_cast_and_copies() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"codes": torch.tensor([1, 2], dtype=torch.uint8), "m": torch.rand(3)}}
    file = io.BytesIO()
    torch.save(copy.deepcopy(saved), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    optimizer.load_state_dict(loaded)
    assert optimizer.state[parameter]["codes"].dtype == torch.bfloat16  # torch's cast
    restore_dtypes(optimizer, loaded)
    state = optimizer.state[parameter]
    assert state["codes"].dtype == torch.uint8
    assert torch.equal(state["m"], saved["state"][0]["m"])
    state["m"].zero_()
    assert loaded["state"][0]["m"].any(), "the loaded tensor moved with ours"
