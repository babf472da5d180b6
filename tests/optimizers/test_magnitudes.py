"""Gradients of any size, and arguments at their extremes: a right step, or one that is counted."""

import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_align import GaLoreAdamW, Muon, StableAdamW
from lightning_align.optimizers.projection import REFRESHES

SHAPES = ((6, 4), (4, 6), (5,))
MAKERS: dict[str, Any] = {
    "StableAdamW": StableAdamW,
    "Muon, newton_schulz": partial(Muon, backend="newton_schulz"),
    "Muon, bf16": partial(Muon, backend="newton_schulz", ns_dtype="bfloat16"),
    "Muon, eigh": partial(Muon, backend="eigh"),
    "Muon, polar_express": partial(Muon, ns_coefficients="polar_express"),
    **{
        f"GaLoreAdamW, {projection}": partial(
            GaLoreAdamW, rank=2, projection=projection, update_proj_gap=2, rotate_moments=True
        )
        for projection in REFRESHES
    },
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

exponents = st.floats(-45, 38)
betas = st.sampled_from([0.0, 1e-300, 0.5, 0.9, 0.999, 1 - 1e-9, 1 - 2**-53])
pytestmark = pytest.mark.filterwarnings("ignore:Muon. parameters came", "ignore:.*is skipped")


def start(make: Any, dtype: torch.dtype, **options: Any) -> tuple[list[nn.Parameter], Any]:
    generator = torch.Generator().manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parameters, make(parameters, **options)


def gradients(low: float, high: float, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Magnitudes from 10^low to 10^high, mixed in each tensor; what leaves the dtype is cut."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for shape in SHAPES:
        exponent = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
        sign = torch.randint(2, shape, generator=generator) * 2 - 1
        largest = torch.finfo(dtype).max
        drawn.append((sign * 10**exponent).clamp(-largest, largest).to(dtype))
    return drawn


def step(parameters: list[nn.Parameter], optimizer: Any, given: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()


def assert_finite(parameters: list[nn.Parameter], optimizer: Any) -> None:
    assert all(parameter.isfinite().all() for parameter in parameters), "weights"
    for parameter in parameters:
        for name, value in optimizer.state[parameter].items():
            assert torch.as_tensor(value).isfinite().all(), name


def too_large(given: list[Tensor]) -> bool:
    return any(float(gradient.double().norm()) >= 1e19 for gradient in given)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15, deadline=None)
@given(spans=st.lists(st.tuples(exponents, exponents), min_size=1, max_size=4))
def test_finite_gradients_leave_finite_weights_and_states(
    make: Any, dtype: torch.dtype, spans: list[tuple[float, float]]
) -> None:
    parameters, optimizer = start(make, dtype)
    skipped = 0
    for seed, span in enumerate(spans):
        drawn = gradients(*span, seed, dtype)
        before = [parameter.detach().clone() for parameter in parameters]
        step(parameters, optimizer, drawn)
        assert_finite(parameters, optimizer)
        skipped += too_large(drawn)
        assert optimizer.skipped_steps == skipped
        if too_large(drawn):
            assert all(map(torch.equal, parameters, before))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("size", [1e-45, 1e-20, 1e10, 1e17])
def test_after_a_gradient_of_any_size_training_goes_on(make: Any, size: float) -> None:
    """torch.optim.AdamW's second moment is infinite after one of 1e21, and its weight stands."""
    parameters, optimizer = start(make, torch.float32, lr=0.1, weight_decay=0.0)
    step(parameters, optimizer, [torch.full(shape, size) for shape in SHAPES])
    step(parameters, optimizer, [torch.full(shape, 1e21) for shape in SHAPES])  # skipped
    before = [parameter.detach().clone() for parameter in parameters]
    step(parameters, optimizer, [torch.full(shape, max(size, 1.0)) for shape in SHAPES])
    for parameter, old in zip(parameters, before, strict=True):
        assert (parameter - old).abs().max() > 1e-3
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("make", [StableAdamW, MAKERS["Muon, newton_schulz"]], ids=str)
@settings(max_examples=40, deadline=None)
@given(low=st.floats(-45, 18), high=st.floats(-45, 18))
def test_the_step_is_that_of_fp64(make: Any, low: float, high: float) -> None:
    """With gradients whose squares are 0 or nearly infinite in fp32."""
    runs = []
    for dtype in (torch.float32, torch.float64):
        parameters, optimizer = start(make, torch.float32, lr=0.1)
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        for seed in range(3):
            step(parameters, optimizer, gradients(low, high, seed, torch.float32))
        assert optimizer.skipped_steps == 0
        runs.append([parameter.detach().double() for parameter in parameters])
    for ours, exact in zip(*runs, strict=True):
        # one step is 0.1 long at most; Newton-Schulz multiplies rounding errors by 3.4^5 = 485
        torch.testing.assert_close(ours, exact, rtol=0, atol=0.1 * 1e-3)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@settings(max_examples=15, deadline=None)
@given(
    beta1=betas,
    beta2=betas,
    eps=st.floats(-16, 18),
    weight_decay=st.sampled_from([0.0, 1e-300, 0.1, 1.0]),
    span=st.tuples(st.floats(-45, 18), st.floats(-45, 18)),
    zeros=st.booleans(),
)
def test_arguments_at_their_extremes_leave_finite_weights(
    make: Any,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    span: tuple[float, float],
    zeros: bool,
) -> None:
    options: dict[str, Any] = {"betas": (beta1, beta2), "weight_decay": weight_decay, "lr": 0.1}
    least = 1e-18 / math.sqrt(1 - beta2)
    if "Muon" in str(make):
        options.update(adamw_eps=max(10**eps, least), eps=max(10**eps, 1e-12), momentum=beta1)
    else:
        options["eps"] = max(10**eps, least)
    parameters, optimizer = start(make, torch.float32, **options)
    generator = torch.Generator().manual_seed(0)
    for seed in range(3):
        drawn = gradients(*span, seed, torch.float32)
        if zeros:  # an embedding's rows that no token asked for
            masks = [torch.rand(each.shape, generator=generator) < 0.5 for each in drawn]
            drawn = [gradient * mask for gradient, mask in zip(drawn, masks, strict=True)]
        step(parameters, optimizer, drawn)
        assert_finite(parameters, optimizer)
        assert optimizer.skipped_steps == 0


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"ns_coefficients": (math.nan, 1.0, 1.0)}, "must keep singular values near 1, and make"),
        ({"ns_coefficients": (1e300, 0.0, 0.0)}, "make nan of one"),
        ({"ns_coefficients": [(2.0, -1.5, 0.5), (10.0, 0.0, 0.0)] * 3}, "near 1, and make"),
        ({"ns_coefficients": (3.4445, -4.775, 3.0315), "ns_steps": 20}, "near 1, and make"),
        ({"ns_steps": True}, "must be a whole number"),
        ({"eps": 0.0}, "at least 1e-12"),
        ({"adamw_eps": 0.0}, "at least 4e-18"),
        ({"lr": 1e30}, r"below 1e\+19"),
        ({"weight_decay": 1e30}, r"below 1e\+19"),
    ],
    ids=str,
)
def test_muon_refuses_arguments_that_leave_fp32(options: Any, rule: str) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"Muon\({name}=.*{rule}"):
        start(Muon, torch.float32, **options)


@pytest.mark.parametrize("make", [StableAdamW, MAKERS["GaLoreAdamW, svd"]], ids=str)
def test_the_others_do_too(make: Any) -> None:
    for options in ({"eps": 0.0}, {"eps": 1e-30}, {"lr": 1e30}, {"weight_decay": 1e300}):
        with pytest.raises(ValueError, match="must be"):
            start(make, torch.float32, **options)
    with pytest.raises(ValueError, match="below"):
        start(GaLoreAdamW, torch.float32, rank=2, scale=1e300)


@pytest.mark.parametrize("steps", [5, 99])
@pytest.mark.parametrize(
    "coefficients", ["polar_express", (3.4445, -4.775, 2.0315), (1.5, -0.5, 0.0), (2, -1.5, 0.5)]
)
def test_coefficients_that_are_in_use_are_taken(coefficients: Any, steps: int) -> None:
    start(Muon, torch.float32, ns_coefficients=coefficients, ns_steps=steps)


@pytest.mark.parametrize("make", [StableAdamW, Muon, MAKERS["GaLoreAdamW, eigh"]], ids=str)
def test_a_step_of_one_parameter_is_checked_as_well(make: Any) -> None:
    parameters, optimizer = start(make, torch.float32)
    before = [parameter.detach().clone() for parameter in parameters]
    for value in (2e19, math.nan):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, value)
            optimizer.step_param(parameter)
    assert all(map(torch.equal, parameters, before))
    assert optimizer.skipped_steps == 2 * len(parameters)
