"""torch.compile around a step: its results, and no compilation for each learning rate."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lightning_align import GaLoreAdamW, Muon, StableAdamW

MAKERS: dict[str, Any] = {
    "Muon": Muon,
    "GaLoreAdamW": partial(GaLoreAdamW, rank=2, update_proj_gap=3),
    "StableAdamW": StableAdamW,
}


def trained(
    make: Any, *, as_tensor: bool = False, compiled_step: Any = None, compiled_model: Any = None
) -> list[Tensor]:
    """The weights after ten steps at ten learning rates; what has a backend is compiled."""
    torch.manual_seed(0)
    inputs, model = torch.randn(3, 4), nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Muon takes all matrices
        optimizer = make(model.parameters(), lr=torch.tensor(0.01) if as_tensor else 0.01)
    forward = torch.compile(model, backend=compiled_model) if compiled_model else model
    step = torch.compile(optimizer.step, backend=compiled_step) if compiled_step else optimizer.step

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = forward(inputs).square().mean()
        loss.backward()
        return loss

    for number in range(10):
        if compiled_step:
            closure()
            step()
        else:
            step(closure)
        for group in optimizer.param_groups:
            lr = 0.01 * 0.9**number
            group["lr"] = torch.tensor(lr) if as_tensor else lr
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_no_learning_rate_compiles_the_step_anew(make: Any, as_tensor: bool) -> None:
    """It was compiled anew for each rate, count and state, up to the limit of recompilations."""
    torch._dynamo.reset()
    counter = CompileCounter()
    ours = trained(make, as_tensor=as_tensor, compiled_step=counter)
    assert counter.frame_count == 0
    assert all(map(torch.equal, ours, trained(make, as_tensor=as_tensor)))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_compiled_model_in_a_closure_stays_compiled(make: Any) -> None:
    """Lightning hands the forward and the backward pass to the step as a closure."""
    torch._dynamo.reset()
    counter = CompileCounter()
    ours = trained(make, compiled_model=counter)
    assert counter.frame_count == 1
    assert all(map(torch.equal, ours, trained(make)))
