"""Muon for hidden matrices and AdamW for everything else, in one optimizer.

torch.optim.Muon takes matrices only, so that embeddings, norms and biases need a second optimizer,
and Lightning's automatic optimization takes one. It always iterates in bf16, which a CPU does some
500 times slower than fp32, and writes a NaN gradient into weights and momentum. Arguments and, in
fp32, results are the same here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_choice
from lightning_align.optimizers import safety
from lightning_align.optimizers.adamw import adamw_, init_adamw_state, moment_dtype
from lightning_align.optimizers.loading import loading, refuse_other_shapes
from lightning_align.optimizers.orthogonalize import (
    JORDAN,
    Backend,
    Dtype,
    check_bounded,
    orthogonalize,
)
from lightning_align.optimizers.sharded_matrices import own_rows, whole

AdjustLr = Literal["original", "match_rms_adamw", "identity"]

# Matrices of one shape go through a GPU together, up to so many elements at a time: launching
# kernels is what small ones wait for. On a CPU a batch gains nothing and costs memory.
_BATCH_ELEMENTS = 2**26

# The norm of a matrix whose entries square to 0 in fp32 comes out as 0: with 1e9 of them it may be
# 1e-14 in truth, and divided by less it would not be below 1, where the polynomial stays bounded.
_LEAST_EPS = 1e-12


def muon_direction(
    gradient: Tensor, momentum_buffer: Tensor, *, momentum: float, nesterov: bool
) -> Tensor:
    """What is to be orthogonalized; the momentum buffer moves in place. Shapes: (rows, columns)."""
    # B <- m B + (1 - m) g, as torch.optim.Muon has it; what follows does not see the factor 1 - m.
    momentum_buffer.lerp_(gradient, 1 - momentum)
    return gradient.lerp(momentum_buffer, momentum) if nesterov else momentum_buffer


def adjusted_lr(lr: float, adjust_lr_fn: AdjustLr | None, outputs: int, inputs: int) -> float:
    """Learning rate of a matrix with that many outputs and inputs.

    Args:
        lr: Learning rate of the group.
        adjust_lr_fn: See ``Muon``; None is "original".
        outputs: Features that the matrix makes: its rows, but the columns of GPT-2's Conv1D.
        inputs: Features that it takes.
    """
    if adjust_lr_fn == "identity":
        return lr
    if adjust_lr_fn == "match_rms_adamw":
        return lr * 0.2 * math.sqrt(max(outputs, inputs))  # arXiv:2502.16982, Eq. 4
    return lr * math.sqrt(max(1, outputs / inputs))  # https://kellerjordan.github.io/posts/muon/


@declared
class Muon(safety._SafeOptimizer):
    """Orthogonalized momentum for hidden matrices; AdamW for all other parameters.

    Groups with ``use_muon=True`` hold matrices only, those with ``use_muon=False`` are AdamW's.
    ``build_param_groups`` makes such groups, and the modules of this package pass them. In a group
    that does not say, two-dimensional parameters are Muon's, vectors and scalars AdamW's, and
    others refused: then it cannot be known which matrices are embeddings or heads.

    A step whose gradients are not all finite and below 1e19 is skipped for all parameters, counted
    in ``skipped_steps`` and, the first time, warned of; ranks that hold parts of the parameters do
    so together. A parameter without a gradient stays as it is.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate of Muon's parameters.
        weight_decay: Share of a parameter that lr times this takes away.
        momentum: Share of the momentum that a step keeps, in [0, 1).
        nesterov: Whether to look one step ahead.
        ns_coefficients: Of the polynomial, (a, b, c); a list of them, one for each step; or
            "polar_express", the best ones for each step (arXiv:2505.16932).
        eps: Least norm that a matrix is divided by.
        ns_steps: How often the polynomial is applied.
        adjust_lr_fn: "original" multiplies the learning rate by sqrt(max(1, outputs / inputs)),
            "match_rms_adamw" by 0.2 sqrt(max(outputs, inputs)), so that learning rates of AdamW
            fit, "identity" by nothing. None is "original", as in torch.
        backend: "newton_schulz", "eigh" (half the time on a CPU), or "auto": the faster one for
            each matrix.
        ns_dtype: Of newton_schulz: "float32", "bfloat16", or "auto": bf16 on a GPU only.
        adamw_lr: Learning rate of AdamW's parameters; None takes ``lr``, which suits
            "match_rms_adamw". With other adjustments Muon's is some ten times AdamW's.
        betas: Decays of AdamW's moments.
        adamw_eps: Added to the root of AdamW's second moment.
        on_nonfinite: If any gradient is not finite, "skip" the step for all parameters, or "raise".

    Raises:
        ValueError: If an argument is out of range, a parameter of Muon is no matrix, a parameter
            is complex or given twice, or a group asks for what torch's AdamW does and this does
            not, such as ``maximize``.

    Example:
        >>> groups = build_param_groups(model)
        >>> optimizer = Muon(groups, lr=0.02, adamw_lr=3e-3)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] | str = JORDAN,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr | None = None,
        *,
        backend: Backend = "auto",
        ns_dtype: Dtype = "auto",
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        on_nonfinite: safety.OnNonfinite = "skip",
    ) -> None:
        check_choice("Muon", "on_nonfinite", on_nonfinite, ("skip", "raise"))
        if adamw_lr is not None:
            safety.check_number("Muon", "adamw_lr", adamw_lr)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "backend": backend,
            "ns_dtype": ns_dtype,
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "adamw_eps": adamw_eps,
            "adamw_lr": lr if adamw_lr is None else adamw_lr,
        }
        _check_settings(defaults)
        super().__init__(params, defaults)
        self.defaults["on_nonfinite"] = on_nonfinite  # of all groups, whatever a checkpoint says

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one that does not say ``use_muon`` may become two."""
        group = {**param_group, "params": safety.listed(param_group["params"])}
        safety.refuse_those_of_other_groups(self, group["params"])
        groups = [group] if "use_muon" in group else _sorted(group)
        for group in groups:
            if not group["use_muon"]:
                group.setdefault("lr", group.get("adamw_lr", self.defaults["adamw_lr"]))
            super().add_param_group(group)
            group.pop("adamw_lr")  # a group has one learning rate, which schedulers move
            _check_settings(group)
            safety.check_parameters("Muon", group)
            if group["use_muon"]:
                _refuse_no_matrices(group)

    @override
    def _step_parameters(self, group: safety.Group, parameters: list[Tensor]) -> None:
        if group["use_muon"]:
            _refuse_no_matrices(group)  # DeepSpeed puts flat ones in their place
            self._step_matrices(group, parameters)
        else:
            self._step_others(group, parameters)

    def _step_matrices(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for batch in _batches(parameters):
            directions = [whole(self._direction(group, parameter)) for parameter in batch]
            updates = orthogonalize(
                torch.stack(directions) if len(batch) > 1 else directions[0],
                coefficients=group["ns_coefficients"],
                steps=group["ns_steps"],
                eps=group["eps"],
                backend=group["backend"],
                dtype=group["ns_dtype"],
            )
            rows, columns = batch[0].shape
            sides = (columns, rows) if group.get("transposed") else (rows, columns)
            lr = adjusted_lr(float(group["lr"]), group["adjust_lr_fn"], *sides)
            # By the rate of the group, not by that of the shape, as in torch.
            kept = 1 - float(group["lr"]) * group["weight_decay"]
            each = updates if len(batch) > 1 else [updates]
            for parameter, update in zip(batch, each, strict=True):
                # 16-bit parameters are rounded once: each by itself, decay would round to nothing.
                update = own_rows(parameter, update)
                wide = parameter if parameter.dtype == update.dtype else parameter.to(update.dtype)
                wide.mul_(kept).add_(update, alpha=-lr)
                if wide is not parameter:
                    parameter.copy_(wide)

    def _direction(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        dtype = moment_dtype(parameter)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=dtype)
        gradient: Any = parameter.grad
        gradient, buffer = gradient.to(dtype), state["momentum_buffer"]
        settings = {name: group[name] for name in ("momentum", "nesterov")}
        return muon_direction(gradient, buffer, **settings)

    def _step_others(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(init_adamw_state(parameter))
        gradients = [p.grad for p in parameters if p.grad is not None]
        states = [self.state[parameter] for parameter in parameters]
        settings = {name: group[name] for name in ("lr", "betas", "weight_decay")}
        adamw_(parameters, gradients, states, eps=group["adamw_eps"], **settings)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            ValueError: If it is the state of other parameters, or of other groups.
        """
        ours = self.param_groups

        def check(state_dict: Mapping[str, Any]) -> None:
            refuse_other_shapes(self, state_dict, state_shapes)
            for own, group in zip(ours, state_dict["param_groups"], strict=True):
                _check_settings({**own, **group})

        def keep_settings() -> None:
            for group, own in zip(self.param_groups, ours, strict=True):
                for name, value in own.items():  # a state of torch.optim.Muon has fewer settings
                    group.setdefault(name, value)

        with loading(self, check, keep_settings):
            super().load_state_dict(dict(state_dict))


def _sorted(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Two groups, of matrices and of others, of one that does not say what it is."""
    params = group["params"]
    if isinstance(params, set):
        return [{**group, "use_muon": True}]  # torch refuses it: a set has no order
    tensors = [item[1] if isinstance(item, tuple) else item for item in params]
    for item, tensor in zip(params, tensors, strict=True):
        if tensor.ndim > 2:  # a convolution, or the matrices of several experts
            told = item[0] if isinstance(item, tuple) else f"of shape {tuple(tensor.shape)}"
            rule = "has more than two dimensions, and its group does not say use_muon"
            way_out = "Pass build_param_groups(module), or a group of it with use_muon=False"
            raise argument_error("Muon", "params", told, rule, way_out)
    parts = {
        is_matrix: [
            item for item, p in zip(params, tensors, strict=True) if (p.ndim == 2) is is_matrix
        ]
        for is_matrix in (True, False)
    }
    if parts[True] and parts[False]:
        warnings.warn(
            "Muon: parameters came without use_muon, so that all of two dimensions are taken for "
            "hidden matrices, embeddings and heads among them. Pass build_param_groups(module), or "
            "add the callback OptimizerSwap.",
            stacklevel=4,
        )
    if not params:
        return [{**group, "use_muon": False}]
    return [
        {**group, "params": part, "use_muon": is_matrix}
        for is_matrix, part in parts.items()
        if part
    ]


def _batches(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Matrices that are orthogonalized together."""
    by_shape: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        # Each is gathered when it is its turn, not all at once.
        is_alone = parameter.device.type == "cpu" or isinstance(parameter, DTensor)
        alone = id(parameter) if is_alone else None
        key = (parameter.shape, parameter.dtype, parameter.device, alone)
        by_shape.setdefault(key, []).append(parameter)
    batches = []
    for same in by_shape.values():
        size = max(1, _BATCH_ELEMENTS // max(1, same[0].numel()))
        batches += [same[start : start + size] for start in range(0, len(same), size)]
    return batches


def state_shapes(group: dict[str, Any], parameter: Tensor) -> dict[str, torch.Size]:
    """Every tensor that the state of a parameter of this group holds."""
    if group["use_muon"]:
        return {"momentum_buffer": parameter.shape}
    return {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}


def _refuse_no_matrices(group: dict[str, Any]) -> None:
    for index, parameter in enumerate(group["params"]):
        if parameter.ndim != 2:
            name, shape = safety.parameter_name(group, index), tuple(parameter.shape)
            rule = (
                f"a group with use_muon=True must hold matrices, and {name} has the shape {shape}"
            )
            way_out = "Put it into a group with use_muon=False"
            raise argument_error("Muon", "params", "...", rule, way_out)


def _check_settings(group: dict[str, Any]) -> None:
    for argument in ("lr", "weight_decay"):
        safety.check_number("Muon", argument, group[argument])
    safety.check_number("Muon", "eps", group["eps"], low=_LEAST_EPS)
    safety.check_number("Muon", "momentum", group["momentum"], high=1)
    safety.check_betas("Muon", group["betas"])
    safety.check_eps("Muon", "adamw_eps", group["adamw_eps"], group["betas"][1])
    check_bounded(group["ns_coefficients"], group["ns_steps"], "Muon")
    safety.refuse_other_arithmetic("Muon", group)
    choices = {
        "adjust_lr_fn": (None, *get_args(AdjustLr)),
        "backend": get_args(Backend),
        "ns_dtype": get_args(Dtype),
    }
    for argument, values in choices.items():
        check_choice("Muon", argument, group[argument], values)
