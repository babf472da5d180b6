"""What GaLore projects: the parameter groups it takes, and their checks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_align._errors import argument_error, check_choice
from lightning_align.optimizers import safety
from lightning_align.optimizers.projection import REFRESHES, projected_shape, sides

WHERE = "GaLoreAdamW"
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_projected(group: safety.Group, parameter: Tensor) -> bool:
    """Whether this parameter of this group has a projection; the others are AdamW's."""
    if group["rank"] is None or parameter.numel() == 0:
        return False
    if group["rank_is_asked_for"]:
        return True
    return parameter.ndim == 2 and min(parameter.shape) > group["rank"]


def rank_of(group: safety.Group, parameter: Tensor) -> int:
    """Rank of its projection: that of the group, at most its shorter side."""
    return int(min(group["rank"], *parameter.shape))


def state_shapes(
    group: safety.Group, parameter: Tensor, rank: int | None = None
) -> dict[str, torch.Size]:
    """Every tensor that the state of a parameter holds; ``rank`` if it is not that of the group."""
    moments = parameter.shape
    bases: dict[str, torch.Size] = {}
    if is_projected(group, parameter):
        rank = rank_of(group, parameter) if rank is None else rank
        rows, cols = parameter.shape
        basis_sides = sides(group["proj_type"], rows, cols)
        moments = projected_shape(basis_sides, parameter.shape, rank)
        lengths = {"left": rows, "right": cols}
        bases = {f"basis_{side}": torch.Size([lengths[side], rank]) for side in basis_sides}
    return {"step": torch.Size(), "exp_avg": moments, "exp_avg_sq": moments, **bases}


def without_rank_if_others_name_it(params: ParamsT) -> Any:
    """galore-torch's groups: those that name a rank are projected, the others are not."""
    if isinstance(params, (Tensor, dict)):
        return params
    items = list(params)
    if any(isinstance(item, dict) and "rank" in item for item in items):
        return [{"rank": None, **item} if isinstance(item, dict) else item for item in items]
    return items


def check_group(group: safety.Group) -> None:
    """Refuse arguments that break their rule; warn of a rank that is cut to the shorter side.

    Raises:
        ValueError: If one does, or a parameter in a group that asks for a rank is no matrix.
    """
    safety.check_number(WHERE, "lr", group["lr"])
    safety.check_betas(WHERE, group["betas"])
    safety.check_eps(WHERE, "eps", group["eps"], group["betas"][1])
    safety.check_number(WHERE, "weight_decay", group["weight_decay"])
    safety.check_number(WHERE, "scale", group["scale"], above_low=True)
    safety.refuse_other_arithmetic(WHERE, group)
    check_integer("update_proj_gap", group["update_proj_gap"], least=1)
    check_choice(WHERE, "projection", group["projection"], REFRESHES)
    sides(group["proj_type"], 1, 1)  # raises
    if group["rank"] is None:
        return
    check_integer("rank", group["rank"], least=1)
    if group.get("rank_is_asked_for"):
        _check_matrices(group)


def _check_matrices(group: safety.Group) -> None:
    rank = group["rank"]
    too_small: list[str] = []
    for index, parameter in enumerate(group["params"]):
        name = safety.parameter_name(group, index)
        if parameter.ndim != 2:
            rule = f"has {parameter.ndim} dimensions, and a group with a rank takes matrices"
            raise argument_error(WHERE, "params", name, rule, "Put it in a group with rank=None")
        if 0 < min(parameter.shape) < rank:
            too_small.append(name)
    if too_small:
        more = f" and {len(too_small) - 3} more" if len(too_small) > 3 else ""
        warnings.warn(
            f"{WHERE}(rank={rank}): more than the shorter side of {', '.join(too_small[:3])}{more}"
            ", whose rank is that side: more memory than AdamW's. Lower rank, or give them a group "
            "with rank=None.",
            stacklevel=2,
        )


def warn_of_embeddings(groups: Iterable[safety.Group]) -> None:
    """Warn if groups that say nothing of a rank hold what has the shape of an embedding or a head.

    One side of theirs, the vocabulary, is longer than any other, four times the other one at least,
    and belongs to one or two matrices.
    """
    matrices = [
        (safety.parameter_name(group, index), parameter)
        for group in groups
        if not group["rank_is_asked_for"] and "use_muon" not in group
        for index, parameter in enumerate(group["params"])
        if is_projected(group, parameter)
    ]
    longest = max((max(parameter.shape) for _, parameter in matrices), default=0)
    of_it = [(name, min(p.shape)) for name, p in matrices if longest in p.shape]
    if len(matrices) < 4 or len(of_it) > 2 or any(longest < 4 * width for _, width in of_it):
        return
    named = " and ".join(name for name, _ in of_it)
    warnings.warn(
        f"{WHERE}(params=...): projected like every other matrix, {named} looks like"
        " an embedding or a head, which GaLore leaves to AdamW. Pass build_param_groups(module), or"
        " groups of which only those of hidden matrices name a rank.",
        stacklevel=3,
    )


def check_integer(argument: str, value: Any, *, least: int) -> None:
    """Refuse what is not an integer of at least ``least``.

    Raises:
        ValueError: If ``value`` is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise argument_error(WHERE, argument, value, f"must be an integer of at least {least}")
