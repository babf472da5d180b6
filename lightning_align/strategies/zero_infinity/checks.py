"""What ZeRO-Infinity refuses, before it trains anything."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_align._errors import argument_error, check_choice, check_least
from lightning_align.offload.block import Block
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.protocols import KnowsGradientFactor
from lightning_align.strategies.zero_infinity.blocks import WHERE
from lightning_align.strategies.zero_infinity.budget import parse_bytes

_LIGHTNING = ("lightning.", "pytorch_lightning.")  # where Lightning's own hooks are defined
_PRECISIONS = ("32-true", "64-true", "bf16-true", "bf16-mixed")
_OF_WHOLE_MODELS = (
    callbacks.BaseFinetuning,
    callbacks.StochasticWeightAveraging,
    callbacks.WeightAveraging,
)
# Hooks between backward and the update, of callbacks and modules; and those of modules that decide
# what becomes of gradients.
_SEE_GRADIENTS = ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")
_DECIDE = ("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping")


def check_arguments(
    nvme_path: Any, memory_limit: int | str, offload_activations: str, tile_numel: int | None
) -> None:
    """Refuse arguments of the strategy that are out of their range.

    Raises:
        ValueError: If one is.
    """
    if nvme_path == []:
        raise argument_error(WHERE, "nvme_path", nvme_path, "must name at least one folder")
    if memory_limit != "auto":
        parse_bytes(memory_limit)
    check_choice(WHERE, "offload_activations", offload_activations, ("none", "cpu", "nvme"))
    if tile_numel is not None:
        check_least(WHERE, 1, tile_numel=tile_numel)


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse what cannot be trained with blocks that come and go.

    Raises:
        ValueError: If the module, a callback, the device or the precision is such.
    """
    name = type(module).__name__
    if (device := trainer.strategy.root_device).type not in ("cpu", "cuda"):
        rule = "blocks are copied to CUDA devices, or computed in host memory"
        raise argument_error(WHERE, "accelerator", str(device), rule, "Set accelerator='cpu'")
    if trainer.precision not in _PRECISIONS:
        rule = f"must be one of {', '.join(map(repr, _PRECISIONS))}: a loss scaler looks at all"
        rule += " gradients at once"
        raise argument_error(WHERE, "precision", trainer.precision, rule)
    if not module.automatic_optimization:
        rule = "it optimizes manually, and blocks are updated by the strategy"
        raise argument_error(WHERE, "model", name, rule, "Use automatic optimization")
    if any(type(part).__name__ == "OptimizedModule" for part in module.modules()):
        rule = "it is compiled, and its compiled code would hold on to weights that come and go"
        raise argument_error(WHERE, "model", name, rule, "Leave torch.compile out")
    for path, part in module.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            rule = f"the gradients of its {path!r} are sparse"
            raise argument_error(WHERE, "model", name, rule, "Set sparse=False there")
    for callback in callbacks_of(trainer):
        if isinstance(callback, _OF_WHOLE_MODELS):
            rule = "it reads or copies the whole model, of which a few blocks are in memory"
            way_out = "Leave the callback out, or use another strategy"
            raise argument_error(WHERE, "callbacks", type(callback).__name__, rule, way_out)


def hooks_on_gradients(trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """What a user has written that may look at gradients, or decide what becomes of them."""
    owners = [(owner, _SEE_GRADIENTS) for owner in (module, *callbacks_of(trainer))]
    return [
        f"{type(owner).__name__}.{hook}"
        for owner, hooks in [*owners, (module, _DECIDE)]
        for hook in hooks
        if _is_users(owner, hook)
    ]


def warn_of_gradients(hooks: list[str], blocks: list[Block]) -> None:
    """Say what it costs that hooks may look at the gradients of blocks."""
    nbytes = sum(p.nbytes for block in blocks for p in block.trainable.values())
    rank_zero_warn(
        f"{WHERE}: the gradients of all blocks stay in memory until the next backward,"
        f" {nbytes:,} bytes, as {', '.join(hooks)} may look at them. Trainer(gradient_clip_val=...)"
        " and strategy.total_grad_norm() need no such memory."
    )


def sees_gradients(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether anything between backward and the update asks for the gradients of all blocks."""
    # Ours only multiplies them, by what it says beforehand.
    known = isinstance(module, KnowsGradientFactor)
    ours = (*_LIGHTNING, "lightning_align.") if known else _LIGHTNING
    return bool(trainer.gradient_clip_val or hooks_on_gradients(trainer, module)) or any(
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
