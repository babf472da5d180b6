"""A Linear that is cut into tiles: rows of its weight, each a block of its own.

A layer whose weight is larger than what may be in memory is never there as a whole: its forward
multiplies with one tile after the other, its backward likewise, and each tile is updated by itself.
To all that looks at parameters (optimizers, norms, what freezes) tiles are ordinary parameters. In
states there is the whole weight under its own name, and the optimizer's state of it in the place
that it has without tiles, so that either side reads the other's checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_align.layers.parts import TILE
from lightning_align.offload.away import Away, go_away
from lightning_align.offload.block import Block
from lightning_align.offload.set_aside import in_memory

_TILES = "_tiles"  # attribute of a layer: the modules of its tiles

SetAside = Callable[[Sequence[Sequence[Tensor]]], list[Tensor]]  # as a store does


@dataclass(frozen=True)
class Tiled:
    """A weight in tiles.

    Attributes:
        name: Of the whole weight.
        tiles: Their names and parameters, from the first row to the last.
    """

    name: str
    tiles: dict[str, nn.Parameter]


class _Tile(nn.Module):
    """Rows of a weight, as what is called; it is in no tree of modules."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Their part of the output."""
        return F.linear(x, self.weight, bias)


def tile(
    blocks: Iterable[Block], modules: Mapping[str, nn.Module], tile_numel: int
) -> tuple[list[Block], dict[str, nn.Module], list[Tiled]]:
    """Cut each Linear of a block that comes and goes, if its weight is larger than a tile.

    Args:
        blocks: All blocks.
        modules: Block -> the module that it is of.
        tile_numel: Elements of a tile; a row is the least.

    Returns:
        Blocks, in which each tile is one; the module of each; what was cut.
    """
    cut, found, owners = [], [], dict(modules)
    for block in blocks:
        module = None if block.kept else owners.pop(block.name, None)
        mine = {} if module is None else _cut_linears(block, module, tile_numel)
        gone = {name for tiled in mine.values() for name in (tiled.name, *tiled.tiles)}
        rest = {name: p for name, p in block.parameters.items() if name not in gone}
        kinds = {"kept": block.kept, "read_only": block.read_only}
        owner = Block(block.name, rest, **kinds) if mine else block
        if rest:
            cut.append(owner)
            owners.update({} if module is None else {block.name: module})
        for linear, tiled in mine.items():
            found.append(tiled)
            parts = vars(linear)[_TILES]
            for part, (name, parameter) in zip(parts, tiled.tiles.items(), strict=True):
                cut.append(Block(name, {name: parameter}, read_only=block.read_only))
                cut[-1].within = owner
                owners[name] = part
    return cut, owners, found


def _cut_linears(block: Block, module: nn.Module, tile_numel: int) -> dict[nn.Module, Tiled]:
    found: dict[nn.Module, Tiled] = {}
    for name, part in module.named_modules():
        full = ".".join(filter(None, (block.name, name)))
        if type(part) is not nn.Linear:  # a subclass may read its weight
            continue
        owned = block.parameters.get(f"{full}.weight") is part.weight
        if owned and part.weight.numel() > tile_numel and "forward" not in vars(part):
            _cut(part, tile_numel)
        if _TILES in vars(part):
            names = [name for name in part._parameters if name.startswith(TILE)]
            found[part] = Tiled(
                f"{full}.weight", {f"{full}.{n}": part.get_parameter(n) for n in names}
            )
    return found


def _cut(linear: nn.Linear, tile_numel: int) -> None:
    """Put tiles in the place of the weight; they are views of it until their blocks are stored."""
    weight, bias = linear.weight, linear.bias
    rows = max(1, tile_numel // linear.in_features)
    nan = torch.full((), torch.nan, dtype=weight.dtype, device=weight.device)
    # Of one that an earlier run has left away nobody will ask for the values.
    is_lost = isinstance(weight, Away) and weight.bring is None
    whole: Any = nan.expand(weight.shape) if is_lost else weight.detach()
    # Views share a counter of versions, and one tile is updated while autograd still needs another.
    parts = [nn.Parameter(part.data, weight.requires_grad) for part in whole.split(rows)]
    del linear.weight, linear.bias
    for number, part in enumerate(parts):
        linear.register_parameter(f"{TILE}{number}", part)
    linear.register_parameter("bias", bias)  # behind the weight again, as optimizers number them
    own = vars(linear)
    own[_TILES] = [_Tile(part) for part in parts]
    own["weight"] = nn.Parameter(nan.expand(weight.shape), requires_grad=False)  # for its shape
    go_away(own["weight"], "weight of a layer in tiles", own["weight"].data)
    own["forward"] = partial(_forward, linear)
    hooks: Any = linear
    hooks.register_state_dict_post_hook(_put_together)
    hooks.register_load_state_dict_pre_hook(partial(_take_apart, [len(part) for part in parts]))


def _forward(linear: nn.Linear, x: Tensor) -> Tensor:
    tiles: list[_Tile] = vars(linear)[_TILES]
    rows = [len(tile.weight) for tile in tiles]
    bias: Any = linear.bias
    biases = [None] * len(rows) if bias is None else bias.split(rows)
    return torch.cat([tile(x, bias) for tile, bias in zip(tiles, biases, strict=True)], -1)


def _put_together(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    """A state dict has the whole weight, unless it has parameters themselves."""
    names = [name for name in state if name.startswith(f"{prefix}{TILE}")]
    if names and not any(isinstance(state[name], nn.Parameter) for name in names):
        state[f"{prefix}weight"] = torch.cat([state.pop(name) for name in names])


def _take_apart(
    rows: list[int], _: nn.Module, state: dict[str, Any], prefix: str, *__: Any
) -> None:
    if f"{prefix}weight" in state:
        for number, part in enumerate(state.pop(f"{prefix}weight").split(rows)):
            state[f"{prefix}{TILE}{number}"] = part


# States


def in_tiles(
    parameters: Iterable[str | nn.Parameter], tiled: Iterable[Tiled]
) -> set[str | nn.Parameter]:
    """The same parameters, with the tiles of a weight for its name."""
    known: dict[Any, list[str]] = {each.name: list(each.tiles) for each in tiled}
    return {part for parameter in parameters for part in known.get(parameter, [parameter])}


def whole_values(
    state: dict[str, Any], tiled: Iterable[Tiled], set_aside: SetAside = in_memory
) -> dict[str, Any]:
    """A module's state with whole weights in the place of tiles.

    Args:
        state: By name.
        tiled: What was cut.
        set_aside: Puts a weight together; one weight at a time is looked at.
    """
    for each in tiled:
        if each.tiles.keys() <= state.keys():
            state[each.name] = _put_aside([state.pop(name) for name in each.tiles], set_aside)
    return state


def _put_aside(parts: list[Tensor], set_aside: SetAside) -> Tensor:
    return torch.cat(parts) if parts[0].is_meta else set_aside([parts])[0]


def in_parts(state: Mapping[str, Tensor], tiled: Iterable[Tiled]) -> dict[str, Tensor]:
    """The other way: tiles in the place of whole weights."""
    parted = dict(state)
    for each in tiled:
        if each.name in parted:
            whole: Any = parted.pop(each.name)
            rows = [len(parameter) for parameter in each.tiles.values()]
            parted.update(zip(each.tiles, whole.split(rows), strict=True))
    return parted


def whole_optimizer_state(
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    tiled: Iterable[Tiled],
    set_aside: SetAside = in_memory,
) -> dict[str, Any]:
    """An optimizer's state as it is without tiles.

    Args:
        state: Its ``state_dict()``.
        optimizer: Whose groups hold the tiles.
        tiled: What was cut.
        set_aside: Puts a tensor of it together.
    """
    known = {p: each for each in tiled for p in each.tiles.values()}
    if not known or not state:  # ranks but the first have none
        return state
    merged: dict[int, Any] = {}
    groups, number = [], 0
    for packed, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        indices: list[int] = []
        names: list[str] = []
        for place, rows in _runs(group["params"], known):
            parts = [state["state"].get(packed["params"][place + k], {}) for k in range(rows)]
            if any(parts):
                merged[number] = _joined(parts, set_aside)
            indices.append(number)
            if "param_names" in packed:
                name = packed["param_names"][place]
                names.append(f"{name.removesuffix(f'{TILE}0')}weight" if rows > 1 else name)
            number += 1
        more = {"param_names": names} if "param_names" in packed else {}
        groups.append({**packed, "params": indices, **more})
    return {**state, "state": merged, "param_groups": groups}


def tiled_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, tiled: Iterable[Tiled]
) -> dict[str, Any]:
    """The other way: what ``load_state_dict`` of an optimizer with tiles takes."""
    known = {p: each for each in tiled for p in each.tiles.values()}
    if not known:
        return state
    split: dict[int, Any] = {}
    groups, number = [], 0
    for packed, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        first = number
        runs = list(_runs(group["params"], known))
        for index, (place, rows) in zip(packed["params"], runs, strict=True):
            parts = group["params"][place : place + rows]
            for k, of_part in enumerate(_parted(state["state"].get(index, {}), parts)):
                if of_part:
                    split[number + k] = of_part
            number += rows
        more = {"param_names": group["param_names"]} if "param_names" in packed else {}
        groups.append({**packed, "params": [*range(first, number)], **more})
    return {**state, "state": split, "param_groups": groups}


def _runs(parameters: list[nn.Parameter], known: Mapping[nn.Parameter, Tiled]) -> Any:
    """(place, number) of what belongs together: a parameter, or all tiles of a weight."""
    place = 0
    while place < len(parameters):
        rows = len(known[parameters[place]].tiles) if parameters[place] in known else 1
        yield place, rows
        place += rows


def _joined(parts: list[dict[str, Any]], set_aside: SetAside) -> dict[str, Any]:
    if len(parts) == 1:
        return parts[0]
    return {
        key: _put_aside([part[key] for part in parts], set_aside) if _has_rows(value) else value
        for key, value in parts[0].items()
    }


def _parted(whole: dict[str, Any], parts: list[nn.Parameter]) -> list[dict[str, Any]]:
    if len(parts) == 1:
        return [whole]
    rows = [len(part) for part in parts]
    columns = {
        key: value.split(rows) if _has_rows(value) else [_copy(value) for _ in rows]
        for key, value in whole.items()
    }
    return [{key: column[k] for key, column in columns.items()} for k in range(len(rows))]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2
