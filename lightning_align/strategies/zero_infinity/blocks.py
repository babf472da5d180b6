"""Which parameters of a module come and go together.

By default a block is an element of a module's outermost lists (``nn.ModuleList``,
``nn.Sequential``): the layers of a decoder, and of most that is built of equal parts. What is in no
block, or tied from one to another, stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from lightning_align._errors import argument_error
from lightning_align.offload.block import Block

WHERE = "ZeROInfinityStrategy"
REST = "rest"

WrapPolicy = Sequence[type[nn.Module] | str] | Callable[[nn.Module], bool]


def find_blocks(
    module: nn.Module, wrap_policy: WrapPolicy | None
) -> tuple[list[Block], dict[str, nn.Module]]:
    """Blocks of all parameters, and the modules that those which come and go belong to.

    Args:
        module: The whole module.
        wrap_policy: Classes of modules that are blocks, or what says of a module whether it is one.

    Raises:
        ValueError: If the policy finds none, or a parameter is not of floating-point numbers.
    """
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            rule = f"must have real floating-point parameters, and {name!r} is {parameter.dtype}"
            raise argument_error(WHERE, "model", type(module).__name__, rule)
        if parameter.is_meta:
            rule = f"its parameter {name!r} is on the meta device"
            way_out = "Build the model with its values"
            raise argument_error(WHERE, "model", type(module).__name__, rule, way_out)
    chosen = dict(_chosen(module, wrap_policy))
    if wrap_policy is not None and not chosen:
        rule = f"must choose at least one module of {type(module).__name__}"
        raise argument_error(WHERE, "wrap_policy", wrap_policy, rule)
    users: dict[int, int] = {}
    for part in chosen.values():
        for parameter in part.parameters():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    outside = {id(p) for p in _outside(module, list(chosen.values()))}
    blocks, rest = [], dict(module.named_parameters())
    for name, part in chosen.items():
        owned = {
            f"{name}.{key}": parameter
            for key, parameter in part.named_parameters()
            if users[id(parameter)] == 1 and id(parameter) not in outside
        }
        if owned:
            blocks.append(Block(name, owned))
    moving = {id(p) for block in blocks for p in block.parameters.values()}
    rest = {name: p for name, p in rest.items() if id(p) not in moving}
    if rest:
        blocks.append(Block(REST, rest, kept=True))
    return blocks, {block.name: chosen[block.name] for block in blocks if not block.kept}


def _chosen(module: nn.Module, policy: WrapPolicy | None) -> Iterator[tuple[str, nn.Module]]:
    """Outermost modules that are blocks, by name."""
    is_block = _asks_policy(policy) if policy is not None else None

    def walk(part: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for key, child in part.named_children():
            name = f"{prefix}{key}"
            inside = isinstance(part, (nn.ModuleList, nn.Sequential))
            found = inside if is_block is None else is_block(child)
            if found and any(True for _ in child.parameters()):
                yield name, child
            else:
                yield from walk(child, f"{name}.")

    return walk(module, "")


def _asks_policy(policy: WrapPolicy) -> Callable[[nn.Module], bool]:
    if callable(policy):
        return policy
    names = {kind if isinstance(kind, str) else _path(kind) for kind in policy}

    def is_named(module: Any) -> bool:
        kinds = type(module).__mro__
        return any(kind.__name__ in names or _path(kind) in names for kind in kinds)

    return is_named


def _outside(module: nn.Module, chosen: list[nn.Module]) -> Iterator[nn.Parameter]:
    """Parameters that a module which is in no block has, too."""
    inside = {id(part) for block in chosen for part in block.modules()}
    for part in module.modules():
        if id(part) not in inside:
            yield from part.parameters(recurse=False)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
