"""What ``memory_limit`` buys: a third buffer, gradients in memory, then blocks that simply stay.

Counted is what the strategy holds. Activations, the interpreter and the libraries come on top.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_align._errors import argument_error, check_least
from lightning_align.offload.block import Block
from lightning_align.offload.buffers import Memory
from lightning_align.strategies.zero_infinity.blocks import WHERE
from lightning_align.strategies.zero_infinity.devices import spread

_SUB_GROUP = 2 << 20  # parameters of a group
_BYTES = 8  # of its state for each
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}


def parse_bytes(limit: int | str) -> int:
    """Bytes of a size such as ``"4GB"``.

    Raises:
        ValueError: If it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(limit))
    if isinstance(limit, bool) or not found or found[2].upper() not in _UNITS:
        rule = "must be a number of bytes, or a size such as '4GB'"
        raise argument_error(WHERE, "memory_limit", limit, rule)
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True)
class Buffers:
    """How many buffers there are; None leaves it to the limit.

    Args:
        params: Blocks of parameters at a time, at least 2.
        optimizer: Groups of optimizer state at a time, at least 1.
        sub_group_size: Parameters of such a group.

    Raises:
        ValueError: If one of them is too small.
    """

    params: int | None = None
    optimizer: int | None = None
    sub_group_size: int | None = None

    def __post_init__(self) -> None:
        if self.params is not None and self.params < 2:
            rule = "must be at least 2: one block computes while the next is read"
            raise argument_error(WHERE, "params_buffer_count", self.params, rule)
        if self.optimizer is not None:
            check_least(WHERE, 1, optimizer_buffer_count=self.optimizer)
        if self.sub_group_size is not None:
            check_least(WHERE, 1, sub_group_size=self.sub_group_size)


def plan(
    blocks: Sequence[Block],
    memory_limit: int | str | Literal["auto"],
    buffers: Buffers,
    *,
    gradients_stay: bool = False,
    ranks: int = 1,
    on_device: bool = False,
) -> Memory:
    """How much may be in memory; blocks that fit are kept there.

    Args:
        blocks: All blocks, of which is said what lies where.
        memory_limit: Bytes; ``"auto"`` takes the least that overlaps reads with compute.
        buffers: How many there are.
        gradients_stay: Whether all gradients are left where autograd puts them.
        ranks: How many share what lies in host memory.
        on_device: Whether something else than the host computes: gradients of one block are then on
            their way, and it stays for its update, while the next computes.

    Raises:
        ValueError: If the limit is below what the largest block needs.
    """
    held = _Held(blocks, gradients_stay, ranks)
    in_memory = gradients_stay or not held.summed_on_drive
    groups = (buffers.optimizer or 2) if any(not block.states_stay for block in blocks) else 0
    group = _BYTES * (buffers.sub_group_size or _SUB_GROUP)
    of_one = 2 * held.tensor  # a group has at least one parameter, with two tensors of state
    fewest = 3 if on_device else 2
    if memory_limit == "auto":
        count = max(buffers.params or 3, fewest)
        pool = held.pool + groups * max(group, of_one) + count * held.largest
        return Memory(count, in_memory, group, pool, groups)
    limit = parse_bytes(memory_limit)
    count = max(buffers.params or 2, fewest)
    least = held.beside + held.pool + count * held.largest
    if buffers.sub_group_size is None:
        group = min(group, max((limit - least) // max(groups, 1), of_one))
    least += groups * max(group, of_one)
    if limit < least:
        rule = _too_low(least, held, gradients_stay)
        way_out = "Raise it, lower sub_group_size, or choose smaller blocks with wrap_policy"
        raise argument_error(WHERE, "memory_limit", memory_limit, rule, way_out)
    free = limit - least
    if buffers.params is None and free >= held.largest:
        count, free = count + 1, free - held.largest
    gradients = in_memory or held.summed_on_drive <= free
    if gradients:
        free -= held.summed_on_drive
    _keep(blocks, free, count * held.largest, gradients=gradients and ranks == 1)
    beside = _Held(blocks, gradients_stay, ranks).beside
    return Memory(count, gradients, group, limit - beside, groups)


def held_nbytes(blocks: Iterable[Block], folders: Sequence[Path], ranks: int) -> dict[str, int]:
    """Most bytes that a state takes on a rank as long as it is held, by folder; "" is memory.

    Its files, and its sections in memory, are not written again: each block that is updated takes
    as much once more.

    Args:
        blocks: All blocks.
        folders: Over which files are spread.
        ranks: How many share a block.
    """
    memory = disk = 0
    for block in blocks:
        values, states = block.section_nbytes, _state_bytes(block) // ranks
        if block.read_only:
            continue
        memory += values * (not block.is_stored) + states * block.states_stay
        disk += values * block.is_stored + states * (not block.states_stay)
    return {"": memory, **{str(folder): disk // len(folders) for folder in folders if disk}}


class _Held:
    """Bytes that must be in memory, in the pool and beside it.

    Args:
        blocks: All blocks.
        gradients_stay: Whether all gradients are left where autograd puts them.
        ranks: How many share what lies in host memory.
    """

    def __init__(self, blocks: Sequence[Block], gradients_stay: bool, ranks: int) -> None:
        moving = [block.nbytes for block in blocks if not block.kept]
        trained = [block for block in blocks if not block.read_only]
        summed = [b.nbytes for b in trained if not (gradients_stay or b.gradients_stay)]
        self.in_grad = sum(block.nbytes for block in trained) - sum(summed)
        in_host = [block for block in blocks if not block.is_stored]
        states = sum(map(_state_bytes, (b for b in trained if b.states_stay))) // ranks
        values = sum(b.nbytes if b.kept else b.nbytes // ranks for b in in_host)
        in_pool = sum(block.nbytes for block in blocks if block.kept and block.is_stored)
        sizes = [place.nbytes for block in blocks for place in block.places.values()]
        self.tensor = max(sizes, default=0)
        self.largest = max(moving, default=0)
        here = [b.nbytes for b in trained if b.states_stay and not b.gradients_stay]
        here = [] if gradients_stay else here  # sums go where the state is
        self.summed_on_drive = sum(summed) - sum(here)
        self.kept = sum(block.nbytes for block in blocks if block.kept)
        # Sums of two blocks are in the pool, and gradients of one where autograd puts them.
        # Of ranks, also the sections of the block that is updated and of the one behind it.
        sections = 2 * self.largest // ranks if ranks > 1 else 0
        self.pool = in_pool + sum(here) + 2 * max(summed, default=0) + sections
        self.beside = values + states + self.in_grad + max(summed, default=0)


def _state_bytes(block: Block) -> int:
    """At most two tensors of an optimizer for one of parameters; in bf16 three in fp32."""
    sizes = ((p.numel(), p.element_size()) for p in block.parameters.values())
    return sum(numel * (2 * size if size >= 4 else 12) for numel, size in sizes)


def _keep(blocks: Sequence[Block], free: int, buffers: int, *, gradients: bool) -> None:
    """Let blocks stay in memory for which there is room: all, or some spread over the order."""
    moving = [block for block in blocks if not block.kept]
    everything = sum(block.nbytes for block in moving)
    if not everything:
        return
    share = 1.0 if everything <= free + buffers else free / everything
    room = everything if share == 1 else free
    for block, stays in zip(moving, spread([b.nbytes for b in moving], share), strict=True):
        if stays and block.nbytes <= room:
            room -= block.nbytes
            block.kept = True
            block.gradients_stay |= gradients and not block.travels


def _too_low(least: int, held: _Held, gradients_stay: bool) -> str:
    rule = f"must be at least {least:,} bytes: the largest block has {held.largest:,} bytes of"
    rule += f" parameters, {held.kept:,} of others stay, and {held.in_grad:,} bytes of gradients"
    return rule + (", for the hooks that look there" if gradients_stay else "")
