"""What keeps an optimizer from training on garbage: checks of arguments and gradients.

torch's own optimizers write a NaN gradient into weights and moments; one of 1e20 makes a second
moment infinite, and its weight never moves again. The step that all optimizers here have in common
is ``_SafeOptimizer``'s; all else are functions, which each calls in its own methods. What is loaded
is checked in loading.py.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import ParamSpec, Protocol, runtime_checkable

from lightning_align._errors import argument_error, finite_number

_P = ParamSpec("_P")
Group = dict[str, Any]
OnNonfinite = Literal["skip", "raise"]

# Keys of the first parameter group, where they are saved and loaded by themselves: how many steps
# were skipped, and how many there were, those included.
SKIPPED, STEPS = "skipped_steps", "steps"


@runtime_checkable
class AgreesOnSteps(Protocol):
    """An optimizer that takes a step on all ranks of ``process_group``, or on none of them.

    A strategy whose ranks hold parts of one model sets it, to the ranks that must agree.
    """

    process_group: ProcessGroup | None


# Second moments and norms square: at this size the square is still a number of fp32, with room for
# the rounding of sums, and at its inverse (times ten, where kernels flush denormals) it is above 0.
LARGEST = 1e19
SMALLEST = 1e-18


# Arguments


def check_number(
    where: str,
    argument: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = LARGEST,
    above_low: bool = False,
) -> None:
    """Refuse what is not a number in [low, high), or in (low, high) if ``above_low``.

    Raises:
        ValueError: If ``value`` is another one, NaN among them.
    """
    number = _number(value)
    if number is None or not low <= number < high or (above_low and number == low):
        least = f"above {low:g}" if above_low else f"of at least {low:g}"
        raise argument_error(where, argument, value, f"must be a number {least}, below {high:g}")


def check_eps(where: str, argument: str, value: Any, beta2: Any) -> None:
    """Refuse an eps that does not stand in for a second moment that is too small for fp32.

    (1 - beta2) g^2 is 0 for a small gradient g; without eps, g would be divided by nothing.

    Raises:
        ValueError: If ``value`` is no number, or too small a one.
    """
    check_number(where, argument, value)
    least = SMALLEST / math.sqrt(1 - float(beta2))
    if float(value) < least:
        rule = f"must be at least {least:.0e} with beta2 {float(beta2):g}: the square of a smaller "
        rule += "gradient is 0 in fp32, and it would be divided by nothing"
        raise argument_error(where, argument, value, rule, "Leave it at its default")


# What groups, and states of other optimizers, may ask for that is not done here -> what asks for
# nothing. foreach, fused and capturable say how to compute the same.
_NOT_DONE = {
    "maximize": False,
    "amsgrad": False,
    "differentiable": False,
    "decoupled_weight_decay": True,  # torch's Adam and AdamW
    "weight_decouple": True,  # pytorch-optimizer
}


def refuse_other_arithmetic(where: str, group: Mapping[str, Any]) -> None:
    """Refuse a group that asks for what other optimizers do and ours do not.

    Raises:
        ValueError: If it does, by the name of the setting.
    """
    for setting, nothing in _NOT_DONE.items():
        is_about_no_decay = nothing and not group.get("weight_decay")
        if bool(group.get(setting, nothing)) is not nothing and not is_about_no_decay:
            rule = "it would be ignored: weights are minimized, with decoupled weight decay"
            raise argument_error(where, setting, group[setting], rule, "Take torch.optim.AdamW")


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


def are_usable(gradients: list[Tensor]) -> bool:
    """Whether every gradient is finite and of a norm below 1e19; waits for the device once.

    On meta, where there are no values, they are. Of a DTensor only this rank's part is looked at.
    """
    filled = [part for part in map(_local, gradients) if part.numel()]
    if not filled:
        return True
    # The norm over all is one fused pass, but several may exceed together what none does alone,
    # and that of fp16 overflows: then look at each.
    total = nn.utils.get_total_norm(filled)
    return (
        total.is_meta or bool(total < LARGEST) or all(norm < LARGEST for norm in map(_norm, filled))
    )


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _norm(gradient: Tensor) -> float:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return float(torch.linalg.vector_norm(gradient, dtype=wide))


def on_all_ranks(gradients: list[Tensor], process_group: ProcessGroup | None) -> tuple[bool, bool]:
    """(``are_usable``, whether there are any), agreed upon by all ranks with parts of one model.

    Args:
        gradients: Of this rank.
        process_group: Ranks that hold other parameters; None asks those that DTensors lie on, and
            where there are none, nobody: under DDP all ranks have the same gradients.
    """
    usable, none = are_usable(gradients), not gradients
    if process_group:
        groups = [(process_group, gradients[0].device.type if gradients else "cpu")]
    else:
        meshes = dict.fromkeys(g.device_mesh for g in gradients if isinstance(g, DTensor))
        # Gradients that were moved to the CPU still lie on a mesh of GPUs, whose group talks there.
        groups = [(group, mesh.device_type) for mesh in meshes for group in mesh.get_all_groups()]
    for group, device in groups:
        flags = torch.tensor([float(usable), float(none)], device=device)
        dist.all_reduce(flags, op=dist.ReduceOp.MIN, group=group)
        usable, none = map(bool, flags)
    return usable, not none


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


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What a closure returns, which computes the gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def begin_step(
    optimizer: Optimizer,
    process_group: ProcessGroup | None = None,
    norms: list[Tensor] | None = None,
) -> bool:
    """Whether the gradients may be used, for the step that is counted here.

    Without any gradient nothing moves, and no step is counted: it was left out by somebody else.

    Args:
        optimizer: Whose step it is.
        process_group: See ``on_all_ranks``.
        norms: Of the gradients, where they are not all here at once.
    """
    gradients = check_gradients(optimizer) if norms is None else norms
    usable, there_are_any = on_all_ranks(gradients, process_group)
    if not there_are_any:
        return False
    may_step = usable or _skipped(optimizer)
    first = optimizer.param_groups[0]
    first[STEPS] = first.get(STEPS, 0) + 1
    return may_step


def not_compiled(step: Callable[_P, None]) -> Callable[_P, None]:
    """A step that ``torch.compile`` leaves as it is.

    Whether it is taken depends on its gradients, and its settings move with every schedule: it
    would be compiled anew again and again. Its kernels are fused ones and matrix products already.
    A closure is called outside of it: what compiles a whole training step compiles that, too.
    """
    reason = "whether and how a step is taken depends on its gradients and its learning rate"
    disable: Any = torch.compiler.disable
    return disable(step, reason=reason)  # type: ignore[no-any-return]


class _SafeOptimizer(Optimizer, ABC):  # private: no choice on the command line
    """An optimizer whose step is taken for all parameters, or, with a bad gradient, for none."""

    # Ranks that hold other parameters, without DTensors: they skip a step together.
    process_group: ProcessGroup | None = None

    @abstractmethod
    def _step_parameters(self, group: Group, parameters: list[Tensor]) -> None:
        """The step of some parameters of a group, all of which have a gradient."""

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite."""
        return skipped_steps(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient.

        Args:
            closure: Computes the loss and the gradients.

        Returns:
            What the closure returned.

        Raises:
            ValueError: If a gradient is sparse, or a parameter of Muon is no matrix any more.
            FloatingPointError: If a gradient is not finite and ``on_nonfinite="raise"``.
        """
        loss = loss_of(closure)
        self._step_all()
        return loss

    @not_compiled
    def _step_all(self) -> None:
        may_step = begin_step(self, self.process_group)
        for group in self.param_groups if may_step else ():
            self._step_parameters(group, [p for p in group["params"] if p.grad is not None])

    def begin_step(self, norms: list[Tensor]) -> bool:
        """Whether a step of gradients with these norms may be taken by ``step_param``; counts it.

        Args:
            norms: Of all gradients, in any order.
        """
        return begin_step(self, self.process_group, norms)

    @torch.no_grad()
    def step_param(self, parameter: Tensor) -> None:
        """The step of one parameter, for whoever updates inside backward, if it may be taken."""
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        gradient = parameter.grad
        if gradient is not None and (are_usable([gradient]) or _skipped(self)):
            self._step_parameters(group, [parameter])


def _skipped(optimizer: Optimizer) -> Literal[False]:
    """A gradient is not usable: this step is skipped for all groups.

    One bad gradient says that the whole backward was bad. Skipped steps are counted in the first
    group, and the first one is warned of.

    Raises:
        FloatingPointError: If a gradient is not usable and ``on_nonfinite`` is "raise".
    """
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
            stacklevel=8,  # whoever called step
        )
    return False


def _culprit(optimizer: Optimizer) -> str:
    """Which gradient is not usable, where, and why."""
    rank = f" on rank {dist.get_rank()}" if dist.is_available() and dist.is_initialized() else ""
    for group, index, parameter in _each(optimizer):
        if parameter.grad is not None and not are_usable([parameter.grad]):
            name = f"the gradient of parameter {parameter_name(group, index)}"
            if bool(_local(parameter.grad).isfinite().all()):
                return f"{name} has a norm above {LARGEST:g}, whose square is no fp32 number{rank}"
            return f"{name} is not finite{rank}"
    return f"a gradient is not finite or too large on another rank; all are usable{rank}"


def skipped_steps(optimizer: Optimizer) -> int:
    """How many steps were skipped, those before a resume included."""
    return int(optimizer.param_groups[0].get(SKIPPED, 0))


def _each(optimizer: Optimizer) -> Iterator[tuple[Group, int, Tensor]]:
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            yield group, index, parameter
