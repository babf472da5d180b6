"""Which part of a model a parameter belongs to: embedding side, one of the blocks, or head side.

What works by block (freezing, fetching, cutting) must put every parameter somewhere, once, and a
weight that is tied must not be missed where it is needed as well. This is the one answer, in names,
which stay what they are when a strategy puts other tensors in their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

if TYPE_CHECKING:
    from lightning_align.layers.map import ModelLayers

# A weight of a Linear that is cut into rows has this name there, and a number behind it.
TILE = "weight_tile"

# A block is told by its number.
Part = Literal["embedding", "head"] | int


@dataclass(frozen=True)
class Parts:
    """The names of a model's parameters by part, each parameter in exactly one of them.

    A tied parameter goes by the first of its names, and belongs to the first of the parts that use
    it: embedding side, head side, then the blocks in their order. So what is also used outside of
    the blocks is in none of them.

    Attributes:
        embedding: The token embedding, and all else that is neither in a block nor of the head.
        blocks: Those of each block, in the order of the blocks.
        head: The output projection and the final norm.
        users: Every name, tied ones included -> the parts that use the parameter, its own first.
    """

    embedding: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    head: tuple[str, ...]
    users: dict[str, tuple[Part, ...]]

    def part_of(self, name: str) -> Part:
        """The part that a parameter belongs to, by any of its names."""
        return self.users[name][0]

    def used_by(self, part: Part) -> tuple[str, ...]:
        """All names of what a part computes with: its own, and what it shares with others."""
        return tuple(name for name, users in self.users.items() if part in users)


def find_parts(layers: ModelLayers) -> Parts:
    """Sort the parameters of a model; names are relative to ``layers.model``."""
    block_names = layers.block_names
    owners: dict[str | None, Part] = {name: number for number, name in enumerate(block_names)}
    owners |= {layers.final_norm_name: "head", layers.head_name: "head"}
    owners[layers.embedding_name] = "embedding"

    def owner(name: str) -> Part | None:
        while name := name.rpartition(".")[0]:
            if name in owners:
                return owners[name]
        return None

    order: list[Part] = ["embedding", "head", *range(len(block_names))]
    users: dict[str, tuple[Part, ...]] = {}
    belongs: dict[Part, list[str]] = {part: [] for part in order}
    for names in parameter_names(layers.model).values():
        found = {owner(name) for name in names}
        # Another name for the head is still the head; one for a block says that it is used outside.
        if None in found and not found & {"embedding", "head"}:
            found.add("embedding")
        parts = tuple(part for part in order if part in found)
        users.update(dict.fromkeys(names, parts))
        belongs[parts[0]].append(names[0])
    embedding, head, *blocks = (tuple(belongs[part]) for part in order)
    return Parts(embedding, tuple(blocks), head, users)


def parameter_names(module: nn.Module) -> dict[nn.Parameter, list[str]]:
    """All names of each parameter, the first one as ``named_parameters()`` has it."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names
