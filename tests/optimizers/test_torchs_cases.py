"""The arguments and the mistakes that torch's own optimizer tests try, with our classes put in.

They are those of torch/testing/_internal/common_optimizers.py (2.13), which does not import without
packages that torch's wheel does not bring.
"""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_align import GaLoreAdamW, Muon, StableAdamW

ADAMWS_ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"lr": 0.01},
    {"lr": torch.tensor(0.001)},
    {"weight_decay": 0.1},
    {"lr": torch.tensor(0.001), "betas": (torch.tensor(0.9), torch.tensor(0.99))},
    {"lr": torch.tensor(0.001), "betas": (torch.tensor([[[0.9]]]), torch.tensor([[0.99]]))},
]
ADAMWS_ARGUMENTS_REFUSED: list[dict[str, Any]] = [
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "amsgrad": True},
    {"lr": torch.tensor(0.001), "foreach": True},
]
MUONS_ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"lr": 0.01},
    {"lr": torch.tensor(0.001)},
    {"weight_decay": 0.2},
    {"momentum": 0.8},
    {"ns_steps": 6},
    {"ns_coefficients": (3.4, -4.7, 2.0)},
]
ONE, OTHER = nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.ones(1, 1))
MISTAKES: dict[str, tuple[Any, dict[str, Any]]] = {
    "one tensor": (ONE, {}),
    "a parameter twice in a group": ([ONE, ONE], {}),
    "a parameter in two groups": ([{"params": ONE}, {"params": ONE}], {}),
    "two learning rates": ([ONE], {"lr": torch.tensor([0.001, 0.001])}),
    "a name for one of two": ([("weight", ONE), OTHER], {}),
    "names in one group of two": ([{"params": [ONE]}, {"params": [("weight", OTHER)]}], {}),
    "beta of 1": ([ONE], {"betas": (1.0, 0.0)}),
    "negative weight decay": ([ONE], {"weight_decay": -1}),
    "complex": ([nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))], {}),
}
MUONS_MISTAKES: dict[str, tuple[Any, dict[str, Any]]] = {
    "three dimensions": ([nn.Parameter(torch.ones(2, 3, 4))], {}),
    "a rule that there is not": ([nn.Parameter(torch.ones(2, 3))], {"adjust_lr_fn": "arbitrary"}),
}

OURS: dict[str, Any] = {
    "Muon": Muon,
    "GaLoreAdamW": partial(GaLoreAdamW, rank=1),
    "StableAdamW": StableAdamW,
}
each_of_ours = pytest.mark.parametrize("make", OURS.values(), ids=OURS)


def weights(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(optimizer: Any, steps: int = 5) -> list[torch.Tensor]:
    """Gradients that stay the same: StableAdamW is AdamW then."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter) / 3
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("settings", ADAMWS_ARGUMENTS, ids=str)
def test_torchs_arguments_of_adamw(settings: dict[str, Any]) -> None:
    ours = train(StableAdamW(weights((6, 4), (5,)), **settings))
    numbers = {**settings, "betas": (0.9, 0.99)}  # torch takes tensors on a GPU only
    theirs = train(torch.optim.AdamW(weights((6, 4), (5,)), **numbers))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)


@each_of_ours
@pytest.mark.parametrize("settings", ADAMWS_ARGUMENTS, ids=str)
def test_all_of_ours_take_them(make: Any, settings: dict[str, Any]) -> None:
    assert all(weight.isfinite().all() for weight in train(make(weights((6, 4)), **settings)))


@each_of_ours
@pytest.mark.parametrize("settings", ADAMWS_ARGUMENTS_REFUSED, ids=str)
def test_arguments_of_adamw_that_ours_do_not_have_are_refused(
    make: Any, settings: dict[str, Any]
) -> None:
    with pytest.raises(TypeError, match=list(settings)[-1]):
        make(weights((6, 4)), **settings)


@pytest.mark.parametrize("settings", MUONS_ARGUMENTS, ids=str)
def test_torchs_arguments_of_muon(settings: dict[str, Any]) -> None:
    start = weights((6, 4), (4, 6))
    theirs = train(torch.optim.Muon(weights((6, 4), (4, 6)), **settings))
    in_bf16: dict[str, Any] = {"backend": "newton_schulz", "ns_dtype": "bfloat16"}
    ours = train(Muon(weights((6, 4), (4, 6)), **settings, **in_bf16))
    for our, their, old in zip(ours, theirs, start, strict=True):
        # bf16 rounds each of some fifteen products to 1 / 256
        assert (our - their).norm() < 0.05 * (their - old).norm()


@each_of_ours
@pytest.mark.parametrize("mistake", MISTAKES)
def test_torchs_mistakes_are_refused_at_construction(make: Any, mistake: str) -> None:
    """torch warns of a parameter that comes twice in a group, and of complex ones at a step."""
    params, settings = MISTAKES[mistake]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, TypeError)):
            make(params, **settings)


@pytest.mark.parametrize("mistake", MUONS_MISTAKES)
def test_torchs_mistakes_with_muon_are_refused_at_construction(mistake: str) -> None:
    params, settings = MUONS_MISTAKES[mistake]
    with pytest.raises(ValueError, match=r"more than two dimensions|adjust_lr_fn='arbitrary'"):
        Muon(params, **settings)
