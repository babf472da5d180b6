"""An optimizer's state of a block, put together from the pieces that ranks have, and divided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.offload.block import Block
from lightning_align.offload.optimizer_stream import is_large
from lightning_align.offload.places import placed
from lightning_align.offload.ranks import Ranks

_States = dict[nn.Parameter, dict[str, Any]]
_SEPARATOR = "\n"  # between the names of a parameter and of what is known of it


def gather_states(ranks: Ranks, block: Block, own: Mapping[nn.Parameter, Any]) -> _States:
    """The states of a block's parameters on rank 0, nothing elsewhere; collective.

    Args:
        ranks: Who has pieces.
        block: Of which.
        own: States of this rank's pieces.
    """
    states = {name: own.get(block.parameters[name], {}) for name in block.pieces}
    tensors = _listed(states)
    small = {n: {k: v for k, v in s.items() if not is_large(v)} for n, s in states.items() if s}
    outlines = {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}
    parts: dict[str, list[Tensor]] = {}
    known: dict[str, dict[str, Any]] = {}
    everyone = ranks.of_all(f"the states of {block.name}", (small, outlines))
    for rank, (smalls, listed) in enumerate(everyone):
        known = {**smalls, **known}  # the same on all that have a piece
        shapes = {k: torch.empty(s, dtype=d, device="meta") for k, (s, d) in listed.items()}
        places, nbytes = placed(shapes)
        memory = torch.empty(nbytes, dtype=torch.uint8)
        if rank == ranks.rank:
            for key, place in places.items():
                place.of(memory).copy_(tensors[key])
        ranks.of_one(f"the states of {block.name} on rank {rank}", memory, rank)
        for key, place in places.items():
            parts.setdefault(key, []).append(place.of(memory))
    if ranks.rank:
        return {}
    whole: _States = {block.parameters[n]: dict(state) for n, state in known.items()}
    for joined, found in parts.items():
        name, key = joined.split(_SEPARATOR)
        together = torch.cat(found).view(block.places[name].shape) if len(found) > 1 else found[0]
        whole[block.parameters[name]][key] = together
    return whole


def keep_own_states(block: Block, states: _States) -> None:
    """Leave what this rank's pieces need of whole states, in place.

    Args:
        block: Of which.
        states: By parameter.
    """
    for name, parameter in block.parameters.items():
        piece = block.pieces.get(name)
        if piece is None:
            states.pop(parameter, None)
        elif parameter in states and piece.place.shape != block.places[name].shape:
            large = {key: value for key, value in states[parameter].items() if is_large(value)}
            states[parameter].update({k: piece.of_whole(v).clone() for k, v in large.items()})


def _listed(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    return {
        f"{name}{_SEPARATOR}{key}": value
        for name, state in states.items()
        for key, value in state.items()
        if is_large(value)
    }
