"""What keeps an optimizer from training on garbage: checks of arguments, gradients and states.

torch's own optimizers write a NaN gradient into weights and moments, take the state of parameters
of other shapes without a word (fused kernels then write beyond it), and cast every loaded state to
the dtype of its parameter. Functions only: each optimizer says in its own methods what it calls.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_align._errors import argument_error, finite_number

Group = dict[str, Any]
OnNonfinite = Literal["skip", "raise"]

# Keys of the first parameter group, where they are saved and loaded by themselves: how many steps
# were skipped, and how many there were, those included.
SKIPPED, STEPS = "skipped_steps", "steps"


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
    return finite_number(value)


def parameter_name(group: Group, index: int) -> str:
    """What an error calls a parameter: its name, if the optimizer was given one."""
    names = group.get("param_names")
    if names:
        return repr(names[index])
    shape = tuple(group["params"][index].shape)
    return f"number {index} of its group, of shape {shape}"


def listed(params: Any) -> Any:
    """A group's parameters as a list, so that they can be looked at before torch takes them."""
    if isinstance(params, Tensor):
        return [params]
    return params if isinstance(params, set) else list(params)  # torch refuses it: no order


def refuse_those_of_other_groups(optimizer: Optimizer, params: Any) -> None:
    """Refuse a parameter that the optimizer has already, by its name, which torch does not tell.

    Raises:
        ValueError: If there is one among ``params``, a group's parameters as ``listed``.
    """
    present = {parameter for _, _, parameter in _each(optimizer)}
    for index, item in enumerate(params):
        name, parameter = item if isinstance(item, tuple) else (None, item)
        if isinstance(parameter, Tensor) and parameter in present:
            told = repr(name) if name else f"number {index} of its group"
            rule = "must be in one group, and is in two"
            raise argument_error(type(optimizer).__name__, "params", told, rule)


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
    """Whether no gradient has an infinity or a NaN; waits for the device once.

    Of a DTensor only this rank's part is looked at.
    """
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    filled = [part for part in parts if part.numel()]
    if not filled:
        return True
    # The norm over all is one fused pass, but it may overflow where no gradient has: then look.
    if bool(nn.utils.get_total_norm(filled).isfinite()):
        return True
    return bool(torch.stack([part.isfinite().all().cpu() for part in filled]).all())


def all_finite_on_all_ranks(gradients: list[Tensor], process_group: ProcessGroup | None) -> bool:
    """The same, agreed upon by all ranks that hold other parts of the same model.

    Args:
        gradients: Of this rank.
        process_group: Ranks that hold other parameters; None asks those that DTensors lie on, and
            where there are none, nobody: under DDP all ranks have the same gradients.
    """
    finite = all_finite(gradients)
    if process_group:
        groups = [(process_group, gradients[0].device.type if gradients else "cpu")]
    else:
        meshes = dict.fromkeys(g.device_mesh for g in gradients if isinstance(g, DTensor))
        # Gradients that were moved to the CPU still lie on a mesh of GPUs, whose group talks there.
        groups = [(group, mesh.device_type) for mesh in meshes for group in mesh.get_all_groups()]
    for group, device in groups:
        flag = torch.tensor(float(finite), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
        finite = bool(flag)
    return finite


def check_gradients(optimizer: Optimizer) -> list[Tensor]:
    """The gradients that are there, in the order of the parameters.

    Raises:
        ValueError: If one of them is sparse.
    """
    gradients: list[Tensor] = []
    for group, index, parameter in _each(optimizer):
        if parameter.grad is None:
            continue
        if parameter.grad.layout != torch.strided:
            where = type(optimizer).__name__
            rule = "its gradient is sparse and must be dense"
            way_out = "Build the embedding with sparse=False"
            raise argument_error(where, "params", parameter_name(group, index), rule, way_out)
        gradients.append(parameter.grad)
    return gradients


def begin_step(
    optimizer: Optimizer,
    closure: Callable[[], Any] | None,
    process_group: ProcessGroup | None = None,
) -> tuple[Any, bool]:
    """What comes before a step is taken.

    Args:
        optimizer: Whose step it is.
        closure: Computes the loss and the gradients.
        process_group: See ``all_finite_on_all_ranks``.

    Returns:
        What the closure returned, and whether the gradients may be used.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    may_step = may_use(optimizer, check_gradients(optimizer), process_group)
    first = optimizer.param_groups[0]
    first[STEPS] = first.get(STEPS, 0) + 1
    return loss, may_step


def may_use(
    optimizer: Optimizer, gradients: list[Tensor], process_group: ProcessGroup | None = None
) -> bool:
    """False if a gradient is not finite and this step is to be skipped for all groups.

    One bad gradient says that the whole backward was bad. Skipped steps are counted in the first
    group, and the first one is warned of.

    Raises:
        FloatingPointError: If a gradient is not finite and ``on_nonfinite`` is "raise".
    """
    if all_finite_on_all_ranks(gradients, process_group):
        return True
    name = type(optimizer).__name__
    first = optimizer.param_groups[0]
    found = f"at step {first.get(STEPS, 0) + 1} {_culprit(optimizer)}"
    if optimizer.defaults["on_nonfinite"] == "raise":
        raise FloatingPointError(
            f"{name}: {found}. Nothing was changed by this step; on_nonfinite='skip' leaves such "
            "steps out."
        )
    first[SKIPPED] = first.get(SKIPPED, 0) + 1
    if first[SKIPPED] == 1:
        warnings.warn(
            f"{name}: {found}. The step is skipped for all parameters; skipped_steps counts such "
            "steps, of which only this first one is warned of.",
            stacklevel=4,
        )
    return False


def _culprit(optimizer: Optimizer) -> str:
    """Which gradient is not finite, and where."""
    rank = f" on rank {dist.get_rank()}" if dist.is_available() and dist.is_initialized() else ""
    for group, index, parameter in _each(optimizer):
        if parameter.grad is not None and not all_finite([parameter.grad]):
            return f"the gradient of parameter {parameter_name(group, index)} is not finite{rank}"
    return f"a gradient is not finite on another rank; all are{rank}"


def check_on_nonfinite(where: str, value: Any) -> None:
    """Refuse what is neither "skip" nor "raise".

    Raises:
        ValueError: If ``value`` is something else.
    """
    if value not in ("skip", "raise"):
        raise argument_error(where, "on_nonfinite", value, "must be one of 'skip', 'raise'")


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
