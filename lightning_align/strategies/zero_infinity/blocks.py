"""Which parameters of a module come and go together.

By default a block is an element of a module's outermost lists (``nn.ModuleList``,
``nn.Sequential``): the layers of a decoder, and of most that is built of equal parts. What is in no
block, or tied from one to another, stays in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from lightning_align._errors import argument_error
from lightning_align.offload.block import Block
from lightning_align.run.protocols import frozen_modules

WHERE = "ZeROInfinityStrategy"
REST = "rest"

WrapPolicy = Sequence[type[nn.Module] | str] | Callable[[nn.Module], bool]


def find_blocks(
    module: nn.Module, wrap_policy: WrapPolicy | None
) -> tuple[list[Block], dict[str, nn.Module]]:
    """Blocks of all parameters, and the modules that those which come and go belong to.

    Modules beside it that take part in its step, such as DPO's reference, have blocks of their own,
    which are only read.

    Args:
        module: The whole module.
        wrap_policy: Classes of modules that are blocks, or what says of a module whether it is one.

    Raises:
        ValueError: If the policy finds none, or a parameter is not of floating-point numbers.
    """
    chosen = dict(_chosen(module, wrap_policy))
    if wrap_policy is not None and not chosen:
        rule = f"must choose at least one module of {type(module).__name__}"
        raise argument_error(WHERE, "wrap_policy", wrap_policy, rule)
    blocks = list(_blocks(module, chosen, dict(module.named_parameters())))
    modules = {block.name: chosen[block.name] for block in blocks if not block.kept}
    for prefix, frozen in frozen_modules(module).items():
        trained = {p for block in blocks for p in block.parameters.values()}
        own = {name: p for name, p in frozen.named_parameters() if p not in trained}
        chosen = dict(_chosen(frozen, wrap_policy))
        for block in _blocks(frozen, chosen, own):
            named = {f"{prefix}.{name}": p for name, p in block.parameters.items()}
            blocks.append(Block(f"{prefix}.{block.name}", named, kept=block.kept, read_only=True))
            if not block.kept:
                modules[blocks[-1].name] = chosen[block.name]
    return blocks, modules


def _blocks(
    module: nn.Module, chosen: dict[str, nn.Module], parameters: dict[str, nn.Parameter]
) -> Iterator[Block]:
    """A block for each module that was chosen, and one of all other parameters."""
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            rule = f"must have real floating-point parameters, and {name!r} is {parameter.dtype}"
            raise argument_error(WHERE, "model", type(module).__name__, rule)
        if parameter.is_meta:
            rule = f"its parameter {name!r} is on the meta device"
            way_out = "Build the model with its values"
            raise argument_error(WHERE, "model", type(module).__name__, rule, way_out)
    users = Counter(p for part in chosen.values() for p in part.parameters())
    outside = set(_outside(module, list(chosen.values())))
    rest = dict(parameters)
    for name, part in chosen.items():
        owned = {
            full: p
            for key, p in part.named_parameters()
            if (full := f"{name}.{key}") in rest and users[p] == 1 and p not in outside
        }
        if owned:
            yield Block(name, owned)
        rest = {full: p for full, p in rest.items() if full not in owned}
    if rest:
        yield Block(REST, rest, kept=True)


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
