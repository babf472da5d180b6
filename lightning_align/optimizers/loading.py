"""What keeps an optimizer from loading garbage: checks of a state, and tensors as they were saved.

torch's own optimizers take the state of parameters of other shapes without a word (fused kernels
then write beyond it), and cast every loaded state to the dtype of its parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_align._errors import argument_error
from lightning_align.optimizers.safety import Group, parameter_name, refuse_other_arithmetic


@contextmanager
def loading(
    optimizer: Optimizer,
    check: Callable[[Mapping[str, Any]], None],
    finish: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Around torch's ``load_state_dict``: what is loaded is checked, and keeps its dtypes.

    Both happen inside of the hooks that others have registered: ``check`` sees what their
    pre-hooks made of the state, and their post-hooks may change what is loaded in the end.

    Args:
        optimizer: Whose state is loaded.
        check: Refuses a state that must not be loaded.
        finish: What the optimizer does to its own state last.
    """
    loaded: dict[str, Any] = {}

    def before(_: Optimizer, state_dict: dict[str, Any]) -> None:
        check(state_dict)
        loaded.update(state_dict)

    def after(_: Optimizer) -> None:
        restore_dtypes(optimizer, loaded)
        finish()

    checked = optimizer.register_load_state_dict_pre_hook(before)
    with checked, optimizer.register_load_state_dict_post_hook(after, prepend=True):
        yield


def refuse_other_shapes(
    optimizer: Optimizer,
    state_dict: Mapping[str, Any],
    expected: Callable[[Group, Tensor], Mapping[str, torch.Size]],
) -> None:
    """Refuse a state that is not one of these parameters, or asks for another arithmetic.

    Args:
        optimizer: Whose ``load_state_dict`` was called.
        state_dict: What is to be loaded.
        expected: What the state of a parameter of a group holds: name -> shape. Asked with the
            optimizer's own groups.

    Raises:
        ValueError: If the number of groups or of parameters, the names of parameters, or what the
            state of one holds is another, or a group asks for what is not done here.
    """
    where = f"{type(optimizer).__name__}.load_state_dict"
    way_out = "Build the optimizer as it was built for the run that saved this state"
    saved_groups = state_dict["param_groups"]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in saved_groups]
    if ours != theirs:
        rule = f"its groups must have {ours} parameters, and they have {theirs}"
        raise argument_error(where, "state_dict", "...", rule, way_out)
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        refuse_other_arithmetic(where, saved)
        names = group.get("param_names", []), saved.get("param_names", [])
        for ours_name, name in zip(*names, strict=False):
            if ours_name != name:
                rule = f"in the place of parameter {ours_name!r} it has {name!r}"
                raise argument_error(where, "state_dict", "...", rule, way_out)
        for index, key in enumerate(saved["params"]):
            state = state_dict["state"].get(key)
            if not state:
                continue  # it never had a gradient
            shapes = expected(group, group["params"][index])
            held = _shapes(state, shapes)
            if held != {name: tuple(shape) for name, shape in shapes.items()}:
                rule = f"the state of parameter {parameter_name(group, index)} must hold "
                rule += f"{_told(shapes)}, and it holds {_told(held)}"
                raise argument_error(where, "state_dict", "...", rule, way_out)


def _shapes(state: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors, and of numbers where a tensor is expected, which AdamW's "step" was."""
    numbers = {name: () for name, value in state.items() if isinstance(value, (int, float))}
    tensors = {n: tuple(value.shape) for n, value in state.items() if isinstance(value, Tensor)}
    return tensors | {name: shape for name, shape in numbers.items() if name in expected}


def _told(shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shapes[name]) for name in sorted(shapes)}


def restore_dtypes(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Put the tensors of ``state_dict`` back as they were saved; call after torch's own loading.

    torch casts all but "step" to the parameter's dtype, so the fp32 moments of bf16 parameters
    lose 16 bits. The tensors are copied: one that a snapshot still holds must not move with ours.
    """
    saved_groups = state_dict["param_groups"]
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        for parameter, key in zip(group["params"], saved["params"], strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name == "step" and not isinstance(value, Tensor):
                    value = torch.tensor(float(value), dtype=torch.float32)
                if isinstance(value, Tensor):
                    copied = value.detach().to(parameter.device, copy=True)
                    optimizer.state[parameter][name] = copied
