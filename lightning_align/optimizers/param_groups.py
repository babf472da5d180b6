"""Which parameters of a module are hidden matrices, and which are something else.

Muon and GaLore are for the matrices between the hidden layers. Embeddings and the head are
matrices, too, but theirs is a row for each token, of which a batch touches a few: they, norms and
biases belong to AdamW. The map of the model and the types of its modules tell them apart, no names.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

from lightning_align._errors import argument_error
from lightning_align.layers import ModelLayers, find_layers
from lightning_align.layers.find import find_language_models, inner_attribute
from lightning_align.layers.parts import TILE, parameter_names

# Group -> what an optimizer is told of it besides its parameters, in the order of the groups.
# "use_muon" is the word of torch's and other Muons; "transposed" says that a matrix is stored
# (in, out), as GPT-2's Conv1D does. Embeddings, norms and biases do not decay.
GROUPS: dict[str, dict[str, Any]] = {
    "matrices": {"use_muon": True},
    "matrices_transposed": {"use_muon": True, "transposed": True},
    "head": {"use_muon": False},
    "others": {"use_muon": False},
    "embeddings": {"use_muon": False, "weight_decay": 0.0},
    "norms_biases": {"use_muon": False, "weight_decay": 0.0},
}
# A tied parameter is what comes first here of all the things that it is.
_PRIORITY = ("embeddings", "head", "norms_biases", "others", "matrices_transposed", "matrices")


class ParameterGroups(list[dict[str, Any]]):
    """Parameter groups as every torch optimizer takes them, which print as a table."""

    def __str__(self) -> str:
        head = ("group", "use_muon", "tensors", "elements", "lr", "weight_decay", "for example")
        rows = [head, *map(_row, self)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(group: dict[str, Any]) -> tuple[str, ...]:
    elements = sum(parameter.numel() for _, parameter in group["params"])
    use_muon, example = "yes" if group["use_muon"] else "no", group["params"][0][0]
    rates = (f"{group[key]:g}" if key in group else "default" for key in ("lr", "weight_decay"))
    return (group["name"], use_muon, str(len(group["params"])), f"{elements:,}", *rates, example)


def build_param_groups(
    module: nn.Module,
    *,
    lr: float | None = None,
    adamw_lr: float | None = None,
    weight_decay: float | None = None,
    adamw_patterns: Sequence[str] = (),
    matrix_patterns: Sequence[str] = (),
    layers_attribute: str | None = None,
    layers: ModelLayers | None = None,
) -> ParameterGroups:
    """Sort the trainable parameters of a module into named groups for an optimizer.

    Hidden matrices are the weights of ``nn.Linear``, of GPT-2's ``Conv1D`` and of
    ``nn.MultiheadAttention``, but for the head. Tied weights come once. Print the result to see
    which parameter went where.

    Args:
        module: Any module; embedding and head are found by ``find_layers`` in the language models
            that it holds.
        lr: Learning rate of the hidden matrices; None leaves it to the optimizer.
        adamw_lr: Learning rate of all others; None leaves it to the optimizer.
        weight_decay: Of hidden matrices, head and others; None leaves it to the optimizer.
            Embeddings, norms and biases do not decay.
        adamw_patterns: Names of parameters that are no hidden matrices, with ``*`` and ``?``, for
            example ``"*.router.*"``.
        matrix_patterns: Names of parameters that are hidden matrices.
        layers_attribute: Dotted name of the list of blocks, from the language model or from
            ``module``, if it is not found.
        layers: Map of the model, where it is known already.

    Returns:
        A list of groups of (name, parameter), each with ``name``, ``use_muon`` and, where they are
        stored (in, out), ``transposed``.

    Raises:
        ValueError: If a pattern matches nothing, if both kinds of patterns match one parameter, if
            one of ``matrix_patterns`` matches what is no matrix, or if nothing is trainable.
    """
    where = "build_param_groups"
    names = parameter_names(module)
    warn = not (adamw_patterns or matrix_patterns)
    kinds = _kinds(module, *_embeddings_and_heads(module, layers, layers_attribute, warn=warn))
    to_adamw = _matching(adamw_patterns, names, "adamw_patterns")
    to_matrices = _matching(matrix_patterns, names, "matrix_patterns")
    for parameter in to_adamw | to_matrices:
        name = names[parameter][0]
        if parameter in to_adamw and parameter in to_matrices:
            rule = f"they must not match {name!r}, as adamw_patterns do"
            raise argument_error(where, "matrix_patterns", list(matrix_patterns), rule)
        if parameter in to_matrices and parameter.ndim != 2:
            rule = f"{name!r} must have 2 dimensions, and its shape is {tuple(parameter.shape)}"
            raise argument_error(where, "matrix_patterns", list(matrix_patterns), rule)
        if parameter in to_matrices and not kinds[parameter].startswith("matrices"):
            kinds[parameter] = "matrices"
        elif parameter in to_adamw and kinds[parameter].startswith("matrices"):
            kinds[parameter] = "others"
    groups = ParameterGroups()
    for name, told in GROUPS.items():
        members = [(names[p][0], p) for p in names if kinds[p] == name and p.requires_grad]
        rate = {"weight_decay": weight_decay, "lr": lr if told["use_muon"] else adamw_lr}
        given = {key: value for key, value in rate.items() if value is not None}
        if members:
            groups.append({"name": name, "params": members, **given, **told})
    if not groups:
        rule = "must have a parameter that requires a gradient"
        raise argument_error(where, "module", type(module).__name__, rule)
    return groups


def parameter_kinds(
    module: nn.Module, layers: ModelLayers | None = None
) -> dict[nn.Parameter, str]:
    """The name of the group that each parameter of a module is sorted into.

    Args:
        module: Any module.
        layers: Map of the model, where it is known already.
    """
    return _kinds(module, *_embeddings_and_heads(module, layers, None, warn=False))


def _matching(
    patterns: Sequence[str], names: dict[nn.Parameter, list[str]], argument: str
) -> set[nn.Parameter]:
    found: set[nn.Parameter] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = {p for p in names if any(fnmatchcase(name, pattern) for name in names[p])}
        if not matched:
            example = next(iter(names.values()), ["none"])[0]
            rule = "matches no parameter"
            way_out = f"Names are like {example!r}; '*' stands for any characters"
            raise argument_error("build_param_groups", argument, pattern, rule, way_out)
        found |= matched
    return found


def _kinds(
    module: nn.Module, embeddings: set[Tensor], heads: set[Tensor]
) -> dict[nn.Parameter, str]:
    """The group of each parameter, by what its modules are."""
    kinds: dict[nn.Parameter, str] = {}
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter in embeddings or isinstance(child, (nn.Embedding, nn.EmbeddingBag)):
                kind = "embeddings"
            elif parameter in heads:
                kind = "head"
            else:
                kind = _kind(child, name, parameter)
            known = kinds.get(parameter, kind)
            kinds[parameter] = min(kind, known, key=_PRIORITY.index)
    return kinds


def _kind(owner: nn.Module, name: str, parameter: nn.Parameter) -> str:
    # Nobody has a Conv1D without having imported transformers, so we need not import it.
    theirs = sys.modules.get("transformers.pytorch_utils")
    if name == "weight" and theirs is not None and isinstance(owner, theirs.Conv1D):
        return "matrices_transposed"
    # Whatever their shape: FSDP1 makes them flat, which Muon must refuse and not leave to AdamW.
    if isinstance(owner, nn.Linear) and (name == "weight" or name.startswith(TILE)):
        return "matrices"
    if parameter.ndim < 2 or "norm" in type(owner).__name__.lower():
        return "norms_biases"
    if isinstance(owner, nn.MultiheadAttention) and name.endswith("proj_weight"):
        return "matrices"
    return "others"


def _embeddings_and_heads(
    module: nn.Module, layers: ModelLayers | None, layers_attribute: str | None, *, warn: bool
) -> tuple[set[Tensor], set[Tensor]]:
    """Weights of the token embeddings and of the heads of all language models in a module."""
    try:
        models = [] if layers else list(find_language_models(module).values()) or [module]
        paths = [
            inner_attribute(module, model, layers_attribute) if layers_attribute else None
            for model in models
        ]
        maps = [layers] if layers else list(map(find_layers, models, paths))
    except ValueError as error:
        heads = _heads_by_size(module)
        names = [name for name, p in module.named_parameters() if p in heads]
        taken = f"{names} is taken for the head" if names else "no head is told apart"
        if warn:
            warnings.warn(
                f"build_param_groups: parameters are sorted by the types of their modules only, "
                f"and {taken}, because {error} If this is not right, name parameters in "
                "adamw_patterns or matrix_patterns.",
                stacklevel=3,
            )
        return set(), heads
    weights: list[Any] = [found.embedding.weight for found in maps]
    return set(weights), {found.head.weight for found in maps}


def _heads_by_size(module: nn.Module) -> set[Tensor]:
    """Weight of the last linear layer with as many outputs as an embedding has rows."""
    rows = {m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)}
    linears = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features in rows]
    return {linear.weight for linear in linears[-1:]}


# Learning rates


def learning_rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of each group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def warn_of_lost_ratios(before: Iterable[float], optimizer: Optimizer, scheduler: Any) -> None:
    """Warn if a scheduler does not keep the ratio of the groups' learning rates.

    Args:
        before: The learning rates when the scheduler was built.
        optimizer: Whose groups it moves.
        scheduler: Any scheduler, a chain of them as well.
    """
    before = list(before)
    if len(set(before)) == 1:
        return
    after = set(learning_rates(optimizer))
    culprit = next(filter(None, map(_floor, _parts(scheduler))), None)
    if len(after) == 1 and after != {0.0}:  # a warm-up may begin with 0 for all
        culprit = f"{type(scheduler).__name__} sets the same ones for all groups"
    if culprit:
        warnings.warn(
            f"The groups of {type(optimizer).__name__} have learning rates of {before}, and "
            f"{culprit}, so that their ratio is lost. Take a scheduler that multiplies, such as "
            "LambdaLR, LinearLR or CosineAnnealingLR with eta_min=0.",
            stacklevel=2,
        )


def _parts(scheduler: Any) -> list[Any]:
    if isinstance(scheduler, (SequentialLR, ChainedScheduler)):
        return [part for inner in scheduler._schedulers for part in _parts(inner)]
    return [scheduler]


def _floor(scheduler: LRScheduler) -> str | None:
    """The number that all groups end at, whatever they began with."""
    for argument in ("eta_min", "min_lr", "min_lrs"):
        value = getattr(scheduler, argument, 0)
        values = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(floor, (int, float)) and floor > 0 for floor in values):
            return f"{type(scheduler).__name__}({argument}={value}) takes all to the same one"
    return None
