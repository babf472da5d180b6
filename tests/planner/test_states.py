"""Bytes of optimizer state against those of real optimizers after a step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_align import GaLoreAdamW, Muon, StableAdamW, build_param_groups
from lightning_align.planner import ModelSpec, ParallelSpec
from lightning_align.planner.states import state_bytes
from tests.helpers.step_models import gpt, llama

MADE: dict[str, Callable[..., Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "stable_adamw": StableAdamW,
    "muon": Muon,
    "galore_adamw": partial(GaLoreAdamW, rank=16),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("build", [gpt, pytest.param(llama, marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_states_are_those_of_the_optimizer_itself(name: str, build: Any, precision: str) -> None:
    model = build().to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    optimizer = MADE[name](build_param_groups(model), lr=1e-3)
    # A gradient of zeros has no subspace: the tokens must differ.
    found: Any = model(torch.arange(2 * 48).view(2, 48))
    logits = found if isinstance(found, Tensor) else found.logits
    logits.square().mean().backward()
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    held = sum(value.nbytes for value in values if isinstance(value, Tensor))
    spec = ModelSpec.from_module(model, seq_len=48)
    rank = 16 if name == "galore_adamw" else None
    parallel = ParallelSpec(optimizer=name, rank=rank, precision=precision)
    shapes = spec.first_shapes + spec.num_layers * spec.block_shapes + spec.last_shapes
    assert state_bytes(shapes, parallel) == held


@pytest.mark.parametrize(
    ("given", "a_parameter"),
    [
        ({"precision": "bf16-true"}, 4),  # torch's AdamW has moments like the parameter
        ({"precision": "bf16-true", "optimizer": "stable_adamw"}, 8),
        ({"precision": "bf16-true", "zero_stage": 2}, 12),  # docs/zero_infinity.md: Half precision
        ({"precision": "bf16-mixed", "zero_stage": 2}, 8),
        ({"precision": "bf16-master"}, 12),
    ],
)
def test_sixteen_bits_and_masters(given: dict[str, Any], a_parameter: int) -> None:
    shapes = (("matrices", (4, 8)),)
    assert state_bytes(shapes, ParallelSpec(**given)) == 4 + a_parameter * 32
    assert state_bytes(shapes, ParallelSpec(optimizer="sgd")) == 0
