"""AdamW that shortens a step whose gradients are larger than its second moment knows.

The second moment of AdamW lags behind: when gradients grow at once, every update is too large until
it has caught up, and losses spike. Clipping the gradient norm does not see it, because it happens
in some tensors only (arXiv:2304.13013, Section 3.4). StableAdamW divides the learning rate of each
tensor by the root mean square of g / sqrt(v) where that is above 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import check_choice
from lightning_align.optimizers import safety
from lightning_align.optimizers.adamw import adamw_, bias_correction, init_adamw_state
from lightning_align.optimizers.loading import loading, refuse_other_shapes


def update_rms(gradient: Tensor, state: dict[str, Any], beta2: float, eps: float) -> Tensor:
    """Root mean square of the coming update, as a 0-d tensor, before any moment has moved.

    RMS_t = sqrt(mean(g_t^2 / max(u_t, eps^2)))                  (arXiv:2304.13013, Algorithm 2)

    with u_t the second moment after this step, bias corrected.
    """
    correction = bias_correction(beta2, state["step"] + 1)
    squares = gradient.to(state["exp_avg_sq"].dtype).square()
    second = state["exp_avg_sq"].mul(beta2).add_(squares, alpha=1 - beta2).div_(correction)
    return squares.div_(second.clamp_(min=eps**2)).mean().sqrt()


@declared
class StableAdamW(safety._SafeOptimizer):
    """AdamW with update clipping (arXiv:2304.13013, Algorithm 2).

    Its state is that of AdamW: a run may change from one to the other. A step whose gradients are
    not all finite and below 1e19 is skipped for all parameters, counted in ``skipped_steps`` and,
    the first time, warned of.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, of which a tensor gets less when its update is too large.
        betas: Decays of the first and of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Share of a parameter that its learning rate times this takes away.
        on_nonfinite: If any gradient is not finite, "skip" the step for all parameters, or "raise".

    Raises:
        ValueError: If an argument is out of range, or a parameter is complex or given twice.

    Example:
        >>> optimizer = StableAdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        on_nonfinite: safety.OnNonfinite = "skip",
    ) -> None:
        check_choice("StableAdamW", "on_nonfinite", on_nonfinite, ("skip", "raise"))
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        _check_settings(defaults)
        super().__init__(params, defaults)
        self.defaults["on_nonfinite"] = on_nonfinite  # of all groups, whatever a checkpoint says

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with settings of its own."""
        group = {**param_group, "params": safety.listed(param_group["params"])}
        safety.refuse_those_of_other_groups(self, group["params"])
        super().add_param_group(group)
        _check_settings(self.param_groups[-1])
        safety.check_parameters("StableAdamW", self.param_groups[-1])

    @override
    def _step_parameters(self, group: safety.Group, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            self._step_one(group, parameter)

    def _step_one(self, group: dict[str, Any], parameter: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state.update(init_adamw_state(parameter))
        gradient: Any = parameter.grad
        beta1, beta2 = map(float, group["betas"])
        eps, decay = group["eps"], group["weight_decay"]
        betas, rms = (beta1, beta2), update_rms(gradient, state, beta2, eps)
        lr = group["lr"] / rms.clamp(min=1)  # eta_t = alpha_t / max(1, RMS_t)
        adamw_([parameter], [gradient], [state], lr=lr, betas=betas, eps=eps, weight_decay=decay)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned, or what torch.optim.AdamW's did.

        Raises:
            ValueError: If it is the state of other parameters.
        """
        with loading(self, self._check_state):
            super().load_state_dict(dict(state_dict))

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        refuse_other_shapes(self, state_dict, state_shapes)
        for group in state_dict["param_groups"]:
            _check_settings({**self.defaults, **group})


def state_shapes(_: dict[str, Any], parameter: Tensor) -> dict[str, torch.Size]:
    """Every tensor that the state of a parameter of this group holds."""
    return {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}


def _check_settings(group: dict[str, Any]) -> None:
    for argument in ("lr", "weight_decay"):
        safety.check_number("StableAdamW", argument, group[argument])
    safety.check_betas("StableAdamW", group["betas"])
    safety.check_eps("StableAdamW", "eps", group["eps"], group["betas"][1])
    safety.refuse_other_arithmetic("StableAdamW", group)
