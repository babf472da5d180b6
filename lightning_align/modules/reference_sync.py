"""A reference that follows the policy: TR-DPO (arXiv:2404.09656), with TRL's words.

Every so many optimizer steps the reference becomes a mixture of itself and the policy, right after
the step: whoever saves or validates then finds it mixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lightning_align._errors import argument_error, check_least, check_whole
from lightning_align.layers import ModelLayers
from lightning_align.layers.sharding import own_part


@dataclass(frozen=True)
class ReferenceSync:
    """How much of the policy the reference takes on, and when.

    Args:
        mixup_alpha: Weight of the policy, in (0, 1]; 1 replaces the reference.
        sync_steps: Optimizer steps between two mixtures.
        where: Class the user called, for error messages.

    Raises:
        ValueError: If one is out of its range.
    """

    mixup_alpha: float = 0.6
    sync_steps: int = 512
    where: str = "ReferenceSync"

    def __post_init__(self) -> None:
        if not 0 < self.mixup_alpha <= 1:
            rule = "must be in (0, 1]"
            raise argument_error(self.where, "ref_model_mixup_alpha", self.mixup_alpha, rule)
        check_whole(self.where, ref_model_sync_steps=self.sync_steps)
        check_least(self.where, 1, ref_model_sync_steps=self.sync_steps)

    def check(self, reference: ModelLayers, policy: ModelLayers) -> None:
        """Refuse a reference that no mixture of it and the policy fits.

        Raises:
            ValueError: If its parameters have other names or shapes.
        """
        theirs, ours = (
            {name: tuple(p.shape) for name, p in layers.model.named_parameters()}
            for layers in (reference, policy)
        )
        different = sorted(n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n))
        if different:
            rule = (
                f"needs a reference with the parameters of the model; {len(different)} differ,"
                f" first {different[0]!r}"
            )
            raise argument_error(self.where, "sync_ref_model", True, rule)

    def after_step(self, number: int, reference: nn.Module, policy: nn.Module) -> None:
        """Mix, if it is time.

        Args:
            number: Of optimizer steps that have been taken, this one too.
            reference: Changed in place.
            policy: Its parameters are in the same order.
        """
        if number % self.sync_steps == 0:
            mix(reference, policy, self.mixup_alpha)


@torch.no_grad()
def mix(reference: nn.Module, policy: nn.Module, alpha: float) -> None:
    """Soft update of a reference, in place: ref <- (1 - alpha) ref + alpha policy (Eq. 5).

    Of models that are sharded alike each rank mixes its parts.
    """
    pairs = zip(reference.parameters(), policy.parameters(), strict=True)
    for frozen, learned in pairs:
        own_part(frozen).mul_(1.0 - alpha).add_(own_part(learned), alpha=alpha)


def sync_of(
    wanted: bool,
    mixup_alpha: float,
    sync_steps: int,
    *,
    where: str,
    needs_reference: bool,
    precomputed: bool,
    adapters: bool,
) -> ReferenceSync | None:
    """How the reference follows the policy; None for one that does not.

    Args:
        wanted: Whether it is to follow.
        mixup_alpha: See ``ReferenceSync``.
        sync_steps: See ``ReferenceSync``.
        where: Class the user called, for error messages.
        needs_reference: Whether there is one.
        precomputed: Whether it runs before training alone.
        adapters: Whether adapters train.

    Raises:
        ValueError: If it cannot follow, or an argument would do nothing.
    """
    if not wanted:
        idle = {"ref_model_mixup_alpha": (mixup_alpha, 0.6)}
        idle["ref_model_sync_steps"] = (sync_steps, 512)
        for name, (value, default) in idle.items():
            if value != default:
                raise argument_error(where, name, value, "does nothing without sync_ref_model=True")
        return None
    rule, way_out = "", "Leave sync_ref_model out"
    if not needs_reference:
        rule = "there is no reference that could follow the model"
    elif precomputed:
        rule = "a reference that runs before training alone cannot follow the model"
        way_out = "Set precompute_ref_log_probs=False"
    elif adapters:
        rule = "the reference is the model without its adapters, whose weights nothing moves"
        way_out = "Train the model itself, without peft_config"
    if rule:
        raise argument_error(where, "sync_ref_model", True, rule, way_out)
    return ReferenceSync(mixup_alpha, sync_steps, where)
