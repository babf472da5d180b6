"""A model as it was before something ran on it: an analysis is no step of training."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Change:
    """Whether what happens to the model is meant to stay."""

    def __init__(self) -> None:
        self.stays = False


@contextmanager
def as_before(model: nn.Module, optimizer: Optimizer | None) -> Iterator[Change]:
    """Context behind which the model is as it was, unless ``stays`` is set and nothing fails.

    That is gradients, buffers, training modes, generators of random numbers and grad mode; if there
    is an optimizer, parameters and its state as well.

    Args:
        model: Of which nothing is copied but buffers and gradients.
        optimizer: Which will be stepped.
    """
    change = Change()
    modes = [(module, module.training) for module in model.modules()]
    kept = [(tensor, tensor.detach().clone()) for tensor in _moving(model, optimizer)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    states = None if optimizer is None else _states(optimizer)
    restore_generators = _generators(model)
    has_gradients = torch.is_grad_enabled()
    failed = True
    try:
        yield change
        failed = False
    finally:
        torch.set_grad_enabled(has_gradients)
        if failed or not change.stays:
            restore_generators()
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for tensor, values in kept:
                    tensor.copy_(values)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            if optimizer is not None and states is not None:
                optimizer.state.clear()
                optimizer.state.update(states)


def _generators(model: nn.Module) -> Callable[[], None]:
    """A function that puts generators back to where they are now."""
    python, numpys, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    states = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpys)
        torch.set_rng_state(torchs)
        for device, state in states.items():
            torch.get_device_module(device).set_rng_state(state, device)

    return restore


def _moving(model: nn.Module, optimizer: Optimizer | None) -> list[Tensor]:
    """What a step writes into."""
    stepped = [] if optimizer is None else [p for g in optimizer.param_groups for p in g["params"]]
    gradients = [p.grad for p in [*model.parameters(), *stepped] if p.grad is not None]
    return [*model.buffers(), *gradients, *stepped]


def _states(optimizer: Optimizer) -> dict[Any, Any]:
    return {parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()}
