"""What ZeRO-Infinity refuses, before it trains anything."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_align._errors import argument_error
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.protocols import KnowsGradientFactor
from lightning_align.strategies.zero_infinity.blocks import WHERE

_LIGHTNING = ("lightning.", "pytorch_lightning.")  # where Lightning's own hooks are defined
_PRECISIONS = ("32-true", "64-true", "bf16-true", "bf16-mixed")
_REFUSED_CALLBACKS = {  # with all classes that inherit from them
    *("StochasticWeightAveraging", "WeightAveraging", "BaseFinetuning"),
}
# Hooks in which gradients of blocks are not in p.grad.
_SEE_GRADIENTS = ("on_after_backward", "on_before_optimizer_step")


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse what cannot be trained with blocks that come and go.

    Raises:
        ValueError: If the module, the precision or the number of ranks is such.
    """
    name = type(module).__name__
    if trainer.world_size > 1:
        rule = "one rank at a time so far"
        raise argument_error(WHERE, "devices", trainer.world_size, rule, "Set devices=1")
    if trainer.strategy.root_device.type != "cpu":
        rule = "blocks are read into host memory and computed there so far"
        device = str(trainer.strategy.root_device)
        raise argument_error(WHERE, "accelerator", device, rule, "Set accelerator='cpu'")
    if trainer.precision not in _PRECISIONS:
        rule = f"must be one of {', '.join(map(repr, _PRECISIONS))}: a loss scaler looks at all"
        rule += " gradients at once"
        raise argument_error(WHERE, "precision", trainer.precision, rule)
    if not module.automatic_optimization:
        rule = "it optimizes manually, and blocks are updated by the strategy"
        raise argument_error(WHERE, "model", name, rule, "Use automatic optimization")
    for hook in ("backward", "optimizer_zero_grad", "configure_gradient_clipping"):
        if getattr(type(module), hook) is not getattr(pl.LightningModule, hook):
            rule = f"it overrides {hook}, and gradients of blocks are not in p.grad"
            way_out = "Remove the override, and clip with Trainer(gradient_clip_val=...)"
            raise argument_error(WHERE, "model", name, rule, way_out)
    if any(type(part).__name__ == "OptimizedModule" for part in module.modules()):
        rule = "it is compiled, and its compiled code would hold on to weights that come and go"
        raise argument_error(WHERE, "model", name, rule, "Leave torch.compile out")
    for callback in callbacks_of(trainer):
        if _REFUSED_CALLBACKS & {kind.__name__ for kind in type(callback).__mro__}:
            rule = "it reads or copies the whole model, of which a few blocks are in memory"
            way_out = "Leave the callback out, or use another strategy"
            raise argument_error(WHERE, "callbacks", type(callback).__name__, rule, way_out)
    for owner in (module, *callbacks_of(trainer)):
        hooks = [hook for hook in _SEE_GRADIENTS if _is_users(owner, hook)]
        if hooks:
            rank_zero_warn(
                f"{WHERE}: {type(owner).__name__} has {', '.join(hooks)}. Gradients of blocks are"
                " not in p.grad there; they are on disk until the update."
            )


def sees_gradients(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether anything between backward and the update asks for the gradients of all blocks."""
    # Ours only multiplies them, by what it says beforehand.
    known = isinstance(module, KnowsGradientFactor)
    ours = (*_LIGHTNING, "lightning_align.") if known else _LIGHTNING
    return bool(trainer.gradient_clip_val) or any(
        not _home(owner, hook).startswith(ours if owner is module else _LIGHTNING)
        for owner in (module, *callbacks_of(trainer))
        for hook in _SEE_GRADIENTS
    )


def _is_users(owner: Any, hook: str) -> bool:
    """Whether a hook was defined by neither Lightning nor us."""
    return not _home(owner, hook).startswith((*_LIGHTNING, "lightning_align."))


def _home(owner: Any, hook: str) -> str:
    """Module of the class that defines a hook."""
    return next(kind for kind in type(owner).__mro__ if hook in vars(kind)).__module__
