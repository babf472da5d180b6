"""GaLore: AdamW in a low-rank subspace of each matrix's gradient (arXiv:2403.03507, Algorithm 2).

For a (rows, cols) matrix with rows >= cols, the state is a basis (cols, rank) and two moments
(rows, rank), where AdamW has two of (rows, cols). galore-torch does the same, but takes an SVD of
all gradients in one step, keeps whole SVD factors alive through views, and saves a Python object,
so its checkpoints do not load as plain data and a change of rank goes unnoticed. Here the basis is
refreshed by subspace iteration (projection.py), matrix after matrix; the state is tensors. With
``projection="svd", stagger=False`` the trajectory is galore-torch's.

Everything else (embeddings, head, norms, biases) is AdamW's, in the same object.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_choice
from lightning_align.optimizers import galore_groups, safety
from lightning_align.optimizers.adamw import State, init_adamw_state, moment_dtype
from lightning_align.optimizers.galore_adamw import adam_direction, galore_adamw_, rotate_moments_
from lightning_align.optimizers.galore_groups import (
    MOMENTS,
    WHERE,
    check_group,
    is_projected,
    rank_of,
)
from lightning_align.optimizers.loading import loading, refuse_other_shapes
from lightning_align.optimizers.projection import Basis, refreshed, sides
from lightning_align.optimizers.sharded_matrices import (
    add_projected_back_,
    for_own_rows,
    has_whole_rows,
    lying_as,
    project,
    whole,
    zeros_lying_as,
)
from lightning_align.seeds import derive_seed

_FAILED = "failed_refreshes"
# What the shape of the state follows from: a checkpoint does not overrule it.
_SHAPING = ("rank", "proj_type", "rank_is_asked_for")


@declared
class GaLoreAdamW(safety._SafeOptimizer):
    """AdamW whose moments of a matrix live in the leading subspace of its gradient (GaLore).

    Projected are: the matrices of a group that names ``rank`` (galore-torch's way; groups that do
    not are then AdamW's), the groups that ``build_param_groups`` marks as hidden matrices, and, of
    groups that say nothing, every matrix with both sides longer than ``rank``. A group may override
    every argument but the last three; ``rank=None`` makes it AdamW's.

    Args:
        params: Parameters, (name, parameter) pairs, or groups of either.
        lr: Learning rate of all groups. GaLore's papers take about ten times AdamW's, since
            ``scale`` multiplies it for projected matrices.
        betas: Decay of the first and the second moment.
        eps: Added to the square root of the second moment, before bias correction, as in
            galore-torch (torch's AdamW adds it after).
        weight_decay: Share of the parameter that lr times this takes away at each step.
        rank: Columns of the projection, at most the shorter side.
        update_proj_gap: Steps between two refreshes of a projection.
        scale: Factor of the update of projected matrices (alpha in the paper).
        proj_type: Which side is projected: ``"std"`` the shorter, ``"reverse_std"`` the longer,
            ``"left"``, ``"right"``, or ``"full"`` for both.
        projection: How a basis is found: ``"subspace"`` (warm subspace iteration), ``"eigh"``
            (exact), ``"randomized"``, ``"svd"`` (galore-torch's call), or ``"random"``.
        stagger: Refresh the matrices one after another over the gap instead of all in one step.
        rotate_moments: Carry the moments into the new basis at a refresh (LDAdam's rule) instead
            of keeping their numbers, as GaLore does.
        on_rank_change: When a state of another rank is loaded: ``"raise"``, or ``"reproject"`` it
            at the next step, with moments carried over.
        on_nonfinite: If any gradient is not finite and below 1e19, ``"skip"`` the step for all
            parameters, which ``skipped_steps`` counts, or ``"raise"``.
        seed: Seed of what the projections draw.

    Raises:
        ValueError: If an argument or a group breaks its rule, or a parameter comes twice.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(64, 32))
        >>> optimizer = GaLoreAdamW([("weight", weight)], lr=0.01, rank=8, update_proj_gap=200)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> state = optimizer.state[weight]
        >>> state["basis_right"].shape, state["exp_avg"].shape
        (torch.Size([32, 8]), torch.Size([64, 8]))

    Note: under FSDP2 each rank has its part of basis and moments, and gathers a matrix's gradient
    where its basis is refreshed; ``on_rank_change="reproject"`` and parts of rows are refused.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        projection: str = "subspace",
        stagger: bool = True,
        rotate_moments: bool = False,
        on_rank_change: Literal["raise", "reproject"] = "raise",
        on_nonfinite: safety.OnNonfinite = "skip",
        seed: int = 0,
    ) -> None:
        check_choice(WHERE, "on_rank_change", on_rank_change, ("raise", "reproject"))
        check_choice(WHERE, "on_nonfinite", on_nonfinite, ("skip", "raise"))
        galore_groups.check_integer("seed", seed, least=0)
        defaults = {
            "lr": lr,
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "projection": projection,
            "stagger": stagger,
            "rotate_moments": rotate_moments,
        }
        check_group({**defaults, "params": []})
        super().__init__(galore_groups.without_rank_if_others_name_it(params), defaults)
        # Of the whole object, not of a group, and not overruled by a checkpoint.
        self.defaults.update(on_rank_change=on_rank_change, on_nonfinite=on_nonfinite, seed=seed)
        galore_groups.warn_of_embeddings(self.param_groups)
        self._check_rank_change()
        if not any(is_projected(group, parameter) for group, parameter in self._each()):
            warnings.warn(
                f"{WHERE}(rank={rank}): no parameter is projected, so this is plain AdamW. Lower "
                "rank below the shorter side of the matrices.",
                stacklevel=2,
            )

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = dict(param_group)
        marked = group.get("use_muon")  # of build_param_groups: hidden matrices, or the rest
        if marked is False:
            group.setdefault("rank", None)
        group["rank_is_asked_for"] = bool(marked) or group.get("rank") is not None
        items = group["params"] = safety.listed(group["params"])
        safety.refuse_those_of_other_groups(self, items)
        merged = {**self.defaults, **group}
        if isinstance(items, list):  # torch answers a set or something that is no tensor
            merged["params"] = [item[1] if isinstance(item, tuple) else item for item in items]
            if items and all(isinstance(item, tuple) for item in items):
                merged["param_names"] = [item[0] for item in items]
            if all(isinstance(parameter, Tensor) for parameter in merged["params"]):
                self._check_new(merged)
        super().add_param_group(group)

    def _check_new(self, group: safety.Group) -> None:
        check_group(group)
        safety.check_parameters(WHERE, group)
        for index, parameter in enumerate(group["params"]):
            if is_projected(group, parameter) and not has_whole_rows(parameter):
                rule = "is a DTensor whose rows are divided, and a rank projects rows"
                way_out = "Shard it along its first dimension, or train with Muon or AdamW"
                name = safety.parameter_name(group, index)
                raise argument_error(WHERE, "params", name, rule, way_out)

    def _check_rank_change(self) -> None:
        answer = self.defaults["on_rank_change"]
        if answer == "reproject" and any(isinstance(p, DTensor) for _, p in self._each()):
            rule = "parameters are DTensors, whose state is loaded in parts into one of its shapes"
            way_out = "Go on with the rank of the checkpoint, or load it in one process or with DDP"
            raise argument_error(WHERE, "on_rank_change", answer, rule, way_out)

    @property
    def failed_refreshes(self) -> int:
        """How often a decomposition failed and the old projection stayed."""
        return int(self.param_groups[0].get(_FAILED, 0))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved state, whose groups' lr, scale, gap and the like then hold.

        Args:
            state_dict: From ``state_dict()``.

        Raises:
            ValueError: If it is of other parameters or another ``proj_type``, or of another rank
                and ``on_rank_change="raise"``.
        """
        ours = self.param_groups

        def check(state_dict: Mapping[str, Any]) -> None:
            if self.defaults["on_rank_change"] == "raise":
                self._refuse_other_ranks(state_dict)
            refuse_other_shapes(self, state_dict, self._expected_shapes(state_dict))
            for own, group in zip(ours, state_dict["param_groups"], strict=True):
                shaping = {key: own[key] for key in _SHAPING}
                check_group({**own, **group, **shaping, "params": []})

        def keep_shaping() -> None:
            for group, own in zip(self.param_groups, ours, strict=True):
                group.update({key: own[key] for key in _SHAPING})
                for parameter in group["params"]:
                    state = self.state.get(parameter)
                    if state:  # read at each step: a GPU would have to be waited for
                        state["step"] = state["step"].cpu()

        with loading(self, check, keep_shaping):
            super().load_state_dict(state_dict)

    # A step

    @override
    def _step_parameters(self, group: safety.Group, parameters: list[Tensor]) -> None:
        others: dict[float, list[Tensor]] = {}  # by number of steps
        for parameter in parameters:
            if is_projected(group, parameter):
                self._step_projected(group, parameter)
            else:
                others.setdefault(self._next_step(parameter), []).append(parameter)
        for weights in others.values():
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            states = [self.state[weight] for weight in weights]
            settings = {name: group[name] for name in ("betas", "eps", "weight_decay")}
            galore_adamw_(weights, gradients, states, lr=float(group["lr"]), **settings)

    def _next_step(self, weight: Tensor) -> float:
        state = self.state[weight]
        if not state:
            state.update(init_adamw_state(weight))
            state["step"] = state["step"].cpu()
        state["step"] += 1
        return float(state["step"])

    def _step_projected(self, group: safety.Group, weight: Tensor) -> None:
        gradient: Any = weight.grad
        gradient = gradient.to(moment_dtype(weight))
        state = self.state[weight]
        lr = float(group["lr"])
        kept = 1 - lr * group["weight_decay"]
        is_due = self._is_due(group, weight, state)
        if is_due and not self._refresh(group, weight, gradient, state):
            weight.mul_(kept)  # Only zeros so far: there is no subspace to be in.
            return
        basis = for_own_rows(_basis(state))
        state["step"] += 1
        direction = adam_direction(project(gradient, basis), state, group["betas"], group["eps"])
        add_projected_back_(weight, direction, basis, beta=kept, alpha=lr * group["scale"] * kept)

    def _is_due(self, group: safety.Group, weight: Tensor, state: State) -> bool:
        if _basis(state).rank != rank_of(group, weight):  # none yet, or loaded with another
            return True
        step = int(state["step"])
        return step == 0 or (step + int(state["offset"])) % int(group["update_proj_gap"]) == 0

    def _refresh(self, group: safety.Group, weight: Tensor, gradient: Tensor, state: State) -> bool:
        """Seek a basis for this gradient; whether there is one then."""
        has_basis = bool(state) and int(state["step"]) > 0
        old = Basis(*map(whole, _basis(state))) if has_basis else Basis()
        index = next(i for i, (_, other) in enumerate(self._each()) if other is weight)
        basis_sides = sides(group["proj_type"], *weight.shape)
        rank = rank_of(group, weight)
        # A run that resumes draws what the run that never stopped drew.
        seed = derive_seed(self.defaults["seed"], index, int(state.get("step", 0)))
        new, succeeded = refreshed(
            group["projection"], whole(gradient), basis_sides, rank, old, seed
        )
        if not succeeded:
            self._count_failure(group, weight)
        # torch loads parts into a state that steps of zeros have made, which must be there then.
        if not has_basis and (new is not old or isinstance(weight, DTensor)):
            self._begin(group, weight, gradient.dtype, state)
        if new is old:
            return has_basis
        if has_basis and (group["rotate_moments"] or new.rank != old.rank):
            turned = {name: whole(state[name]) for name in ("step", *MOMENTS)}
            rotate_moments_(turned, old, new, group["betas"])
            state.update({name: lying_as(weight, turned[name]) for name in MOMENTS})
        for side, vectors in new._asdict().items():
            if vectors is not None:
                state[f"basis_{side}"] = lying_as(weight, vectors)
        return True

    def _begin(self, group: safety.Group, weight: Tensor, dtype: torch.dtype, state: State) -> None:
        """Make the state of a matrix, all of it zeros."""
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name, shape in galore_groups.state_shapes(group, weight).items():
            if name != "step":
                state[name] = zeros_lying_as(weight, shape, dtype)
        state["offset"] = self._offset(group, weight) if group["stagger"] else 0

    def _offset(self, group: safety.Group, weight: Tensor) -> int:
        """Where in the gap this matrix is refreshed: spread by size, as the work is."""
        projected = [other for pair, other in self._each() if is_projected(pair, other)]
        place = next(i for i, other in enumerate(projected) if other is weight)
        before = sum(other.numel() for other in projected[:place])
        total = sum(other.numel() for other in projected)
        return before * int(group["update_proj_gap"]) // total

    def _count_failure(self, group: safety.Group, weight: Tensor) -> None:
        first = self.param_groups[0]
        first[_FAILED] = first.get(_FAILED, 0) + 1
        if first[_FAILED] == 1:
            index = next(i for i, other in enumerate(group["params"]) if other is weight)
            warnings.warn(
                f"{WHERE}(projection={group['projection']!r}): the decomposition for parameter "
                f"{safety.parameter_name(group, index)} failed, in double precision too. The old "
                f"projection stays; {_FAILED} counts these, and only this first one is warned of.",
                stacklevel=2,
            )

    def _each(self) -> list[tuple[safety.Group, Tensor]]:
        return [(group, p) for group in self.param_groups for p in group["params"]]

    # A state

    def _refuse_other_ranks(self, state_dict: Mapping[str, Any]) -> None:
        where = f"{WHERE}.load_state_dict"
        way_out = "Pass that rank, or on_rank_change='reproject' to carry the moments over"
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            ours, theirs = group["rank"], saved.get("rank", group["rank"])
            if ours != theirs:
                rule = f"the state was saved with rank {theirs}"
                raise argument_error(where, "rank", ours, rule, way_out)

    def _expected_shapes(
        self, state_dict: Mapping[str, Any]
    ) -> Callable[[safety.Group, Tensor], Mapping[str, torch.Size]]:
        """What ``refuse_other_shapes`` asks; under "reproject" with the rank that was saved."""
        saved = {
            parameter: state_dict["state"].get(key, {})
            for group, other in zip(self.param_groups, state_dict["param_groups"], strict=False)
            for parameter, key in zip(group["params"], other["params"], strict=False)
        }
        reproject = self.defaults["on_rank_change"] == "reproject"

        def expected(group: safety.Group, parameter: Tensor) -> Mapping[str, torch.Size]:
            rank = _basis(saved[parameter]).rank if reproject else 0
            return galore_groups.state_shapes(group, parameter, rank or None)

        return expected


def _basis(state: Mapping[str, Any]) -> Basis:
    return Basis(state.get("basis_left"), state.get("basis_right"))
