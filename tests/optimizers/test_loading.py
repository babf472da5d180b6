import copy
import io
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align import GaLoreAdamW, Muon, StableAdamW
from lightning_align.optimizers.loading import refuse_other_shapes, restore_dtypes

OURS: dict[str, Any] = {
    "Muon": Muon,
    "GaLoreAdamW": partial(GaLoreAdamW, rank=2),
    "StableAdamW": StableAdamW,
}
each_of_ours = pytest.mark.parametrize("make", OURS.values(), ids=OURS)


def optimizer_of(**names: tuple[int, ...]) -> torch.optim.Optimizer:
    """An AdamW of named parameters, one group for each, with gradients of ones."""
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in names.items()}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    return torch.optim.AdamW([{"params": [item]} for item in parameters.items()])


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


# All three optimizers


def trained(make: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, list[nn.Parameter]]:
    """After one step of two parameters."""
    generator = torch.Generator().manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((6, 4), (5,))
    ]
    optimizer = make(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer, parameters


def moments_of(optimizer: Any, parameters: list[nn.Parameter]) -> list[Tensor]:
    return [value for p in parameters for _, value in moment_items(optimizer.state[p])]


def moment_items(state: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return [(n, v) for n, v in state.items() if isinstance(v, Tensor) and v.ndim > 0]


@each_of_ours
def test_what_a_pre_hook_makes_of_the_state_is_loaded(make: Any) -> None:
    saved = trained(make)[0].state_dict()

    def third(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {
            key: {**held, **{name: value / 3 for name, value in moment_items(held)}}
            for key, held in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    optimizer, parameters = trained(make)
    before = moments_of(optimizer, parameters)
    optimizer.register_load_state_dict_pre_hook(third)
    optimizer.load_state_dict(saved)
    after = moments_of(optimizer, parameters)
    assert {value.dtype for value in after} == {torch.float32}
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs / 3, rtol=0, atol=0)


@each_of_ours
def test_a_pre_hook_may_adapt_a_state_that_would_be_refused(make: Any) -> None:
    """What torch's documentation has it for: other parameters, told by their names."""
    optimizer, parameters = trained(make)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for name, value in moment_items(state):
            state[name] = torch.cat([value, value])

    def first_half(_: Any, state_dict: dict[str, Any]) -> None:
        for state in state_dict["state"].values():
            for name, value in moment_items(state):
                state[name] = value[: len(value) // 2]

    with pytest.raises(ValueError, match="must hold"):
        optimizer.load_state_dict(copy.deepcopy(saved))
    expected = moments_of(optimizer, parameters)
    optimizer.register_load_state_dict_pre_hook(first_half)
    optimizer.load_state_dict(saved)
    assert all(map(torch.equal, moments_of(optimizer, parameters), expected))


@each_of_ours
def test_a_post_hook_finds_the_state_as_it_stays_and_may_change_it(make: Any) -> None:
    optimizer, parameters = trained(make)
    found: list[Tensor] = []

    def clear(_: Any) -> None:
        found.extend(value.clone() for value in moments_of(optimizer, parameters))
        for value in moments_of(optimizer, parameters):
            value.zero_()

    expected = moments_of(optimizer, parameters)
    optimizer.register_load_state_dict_post_hook(clear)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(map(torch.equal, found, expected))
    assert not any(value.any() for value in moments_of(optimizer, parameters))


@each_of_ours
def test_hooks_are_those_of_the_user_after_a_load(make: Any) -> None:
    optimizer, _ = trained(make)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="groups must have"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


@each_of_ours
def test_what_others_keep_in_the_state_is_left_to_them(make: Any) -> None:
    """Wrappers of optimizers keep tensors, numbers and dictionaries of their own there."""
    optimizer, parameters = trained(make)
    saved = optimizer.state_dict()
    others = {"trac": {"s": torch.ones(3)}, "slow": torch.ones(2), "k": 5}
    saved["state"].update(copy.deepcopy(others))
    optimizer.load_state_dict(saved)
    assert optimizer.state["k"] == 5
    assert torch.equal(optimizer.state["slow"], others["slow"])
    assert torch.equal(optimizer.state["trac"]["s"], torch.ones(3))
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in parameters)


@each_of_ours
@pytest.mark.parametrize("number", [1, 1.0])
def test_a_step_may_be_a_number_as_in_older_states_of_adamw(make: Any, number: Any) -> None:
    optimizer, parameters = trained(make)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = number
    other, others = trained(make)
    other.load_state_dict(saved)
    for one, same in ((optimizer, parameters), (other, others)):
        for parameter in same:
            parameter.grad = torch.ones_like(parameter)
        one.step()
    assert all(map(torch.equal, parameters, others))
    assert all(isinstance(s["step"], Tensor) for s in other.state.values() if "step" in s)


@each_of_ours
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("maximize", True),
        ("amsgrad", True),
        ("decoupled_weight_decay", False),
        ("lr", float("nan")),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
    ],
)
def test_settings_of_a_state_are_checked_as_arguments_are(
    make: Any, setting: str, value: Any
) -> None:
    """AdamW that ascends or adds decay to the gradient was taken for one that does neither."""
    optimizer, parameters = trained(make)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][-1].update({"weight_decay": 0.1, setting: value})
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=rf"{setting}={re.escape(repr(value))}\)"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == before
    with pytest.raises(ValueError, match=rf"{setting}={re.escape(repr(value))}\)"):
        make([{"params": parameters, "weight_decay": 0.1, setting: value}])
