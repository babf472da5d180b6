"""What keeps an optimizer from training on garbage: checks of arguments, gradients and states.

torch's own optimizers write a NaN gradient into weights and moments, take the state of parameters
of other shapes without a word (fused kernels then write beyond it), and cast every loaded state to
the dtype of its parameter. Functions only: each optimizer says in its own methods what it calls.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_align._errors import argument_error

Group = dict[str, Any]

# Key of a parameter group: how many steps were skipped. There it is saved and loaded by itself.
SKIPPED = "skipped_steps"


# Arguments


def check_number(
    where: str,
    argument: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    above_low: bool = False,
) -> None:
    """Refuse what is not a number in [low, high), or in (low, high) if ``above_low``.

    Raises:
        ValueError: If ``value`` is another one, NaN among them.
    """
    number = _number(value)
    if number is None or not low <= number < high or (above_low and number == low):
        least = f"above {low:g}" if above_low else f"of at least {low:g}"
        most = "and finite" if high == math.inf else f"and below {high:g}"
        raise argument_error(where, argument, value, f"must be a number {least} {most}")


def check_betas(where: str, betas: Any) -> None:
    """Refuse what is not two numbers in [0, 1).

    Raises:
        ValueError: If ``betas`` is something else.
    """
    pair = tuple(betas) if isinstance(betas, (tuple, list)) else ()
    numbers = [_number(beta) for beta in pair]
    if len(pair) != 2 or any(beta is None or not 0 <= beta < 1 for beta in numbers):
        raise argument_error(where, "betas", betas, "must be two numbers of at least 0 and below 1")


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else None


def parameter_name(group: Group, index: int) -> str:
    """What an error calls a parameter: its name, if the optimizer was given one."""
    names = group.get("param_names")
    if names:
        return repr(names[index])
    shape = tuple(group["params"][index].shape)
    return f"number {index} of its group, of shape {shape}"


def check_parameters(where: str, group: Group) -> None:
    """Refuse complex parameters, and one that comes twice.

    Raises:
        ValueError: If the group holds such a parameter.
    """
    seen: set[Tensor] = set()
    for index, parameter in enumerate(group["params"]):
        if not parameter.is_floating_point():
            rule = f"must be of real floating-point numbers, and one is {parameter.dtype}"
            raise argument_error(where, "params", parameter_name(group, index), rule)
        if parameter in seen:
            rule = "must be given once"
            way_out = "Tied weights: pass named_parameters() or build_param_groups()"
            raise argument_error(where, "params", parameter_name(group, index), rule, way_out)
        seen.add(parameter)


# Gradients


def all_finite(gradients: list[Tensor]) -> bool:
    """Whether no gradient has an infinity or a NaN; waits for the device once."""
    filled = [gradient for gradient in gradients if gradient.numel()]
    if not filled:
        return True
    # The norm over all is one fused pass, but it may overflow where no gradient has: then look.
    if bool(nn.utils.get_total_norm(filled).isfinite()):
        return True
    return bool(torch.stack([gradient.isfinite().all().cpu() for gradient in filled]).all())


def check_gradients(where: str, optimizer: Optimizer) -> list[Tensor]:
    """The gradients that are there, in the order of the parameters.

    Raises:
        ValueError: If one of them is sparse.
    """
    gradients: list[Tensor] = []
    for group, index, parameter in _each(optimizer):
        if parameter.grad is None:
            continue
        if parameter.grad.layout != torch.strided:
            rule = "its gradient is sparse and must be dense"
            way_out = "Build the embedding with sparse=False"
            raise argument_error(where, "params", parameter_name(group, index), rule, way_out)
        gradients.append(parameter.grad)
    return gradients


def skip_non_finite(optimizer: Optimizer, gradients: list[Tensor]) -> bool:
    """Whether this step is to be skipped for all groups, because a gradient is not finite.

    One bad gradient says that the whole backward was bad. Skipped steps are counted in the first
    group, and the first one is warned of.
    """
    if all_finite(gradients):
        return False
    first = optimizer.param_groups[0]
    first[SKIPPED] = first.get(SKIPPED, 0) + 1
    if first[SKIPPED] == 1:
        bad = next(
            parameter_name(group, index)
            for group, index, parameter in _each(optimizer)
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        )
        warnings.warn(
            f"{type(optimizer).__name__}: the gradient of parameter {bad} is not finite. The step "
            "is skipped for all parameters; skipped_steps counts such steps, of which only this "
            "first one is warned of.",
            stacklevel=3,
        )
    return True


def skipped_steps(optimizer: Optimizer) -> int:
    """How many steps were skipped, those before a resume included."""
    return int(optimizer.param_groups[0].get(SKIPPED, 0))


def _each(optimizer: Optimizer) -> Iterator[tuple[Group, int, Tensor]]:
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            yield group, index, parameter


# States


def refuse_other_shapes(
    optimizer: Optimizer,
    state_dict: Mapping[str, Any],
    expected: Callable[[Group, Tensor], Mapping[str, torch.Size]],
) -> None:
    """Refuse a state that is not one of these parameters.

    Args:
        optimizer: Whose ``load_state_dict`` was called.
        state_dict: What it was given.
        expected: What the state of a parameter of a group holds: name -> shape. Asked with the
            optimizer's own groups.

    Raises:
        ValueError: If the number of groups or of parameters, the names of parameters, or what the
            state of one holds is another.
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
        names = group.get("param_names", []), saved.get("param_names", [])
        for ours_name, name in zip(*names, strict=False):
            if ours_name != name:
                rule = f"in the place of parameter {ours_name!r} it has {name!r}"
                raise argument_error(where, "state_dict", "...", rule, way_out)
        for index, key in enumerate(saved["params"]):
            state = state_dict["state"].get(key)
            if not state:
                continue  # it never had a gradient
            shapes = _shapes(expected(group, group["params"][index]))
            tensors = {n: value.shape for n, value in state.items() if isinstance(value, Tensor)}
            if _shapes(tensors) != shapes:
                rule = (
                    f"the state of parameter {parameter_name(group, index)} must hold {shapes}, "
                    f"and it holds {_shapes(tensors)}"
                )
                raise argument_error(where, "state_dict", "...", rule, way_out)


def _shapes(shapes: Mapping[str, torch.Size]) -> dict[str, tuple[int, ...]]:
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
                if isinstance(value, Tensor):
                    copied = value.detach().to(parameter.device, copy=True)
                    optimizer.state[parameter][name] = copied
