"""What ``memory_limit`` buys: gradients that stay in memory, and more blocks of parameters there.

Counted is what the strategy holds. Activations, the interpreter and the libraries come on top.
"""

from __future__ import annotations

import re
from typing import Literal

from lightning_align._errors import argument_error
from lightning_align.offload.block import Block
from lightning_align.offload.engine import Memory
from lightning_align.strategies.zero_infinity.blocks import WHERE

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


def plan(
    blocks: list[Block],
    memory_limit: int | str | Literal["auto"],
    params_buffer_count: int | None,
    group_bytes: int,
    gradients_stay: bool = False,
) -> Memory:
    """How much may be in memory.

    Args:
        blocks: All blocks.
        memory_limit: Bytes; ``"auto"`` takes the least that overlaps reads with compute.
        params_buffer_count: Blocks at a time; None leaves it to ``memory_limit``.
        group_bytes: Optimizer state at a time.
        gradients_stay: Whether all gradients are left where autograd puts them.

    Raises:
        ValueError: If the limit is below what the largest block needs.
    """
    kept = sum(block.nbytes for block in blocks if block.kept)
    moving = [block.nbytes for block in blocks if not block.kept]
    largest = max(moving, default=0)
    tensor = max((place.nbytes for block in blocks for place in block.places.values()), default=0)
    # Parameters of what stays; the gradients of two blocks; the state of two groups. Beside the
    # pool are gradients where autograd puts them: of what stays, and of one block.
    states = 2 * max(group_bytes, 2 * tensor)
    fixed, beside = kept + 2 * largest + states, kept + largest
    if gradients_stay:
        beside = kept + sum(moving)
    if memory_limit == "auto":
        count = params_buffer_count or 3
        return Memory(count, gradients_stay, group_bytes, fixed + largest * count)
    limit = parse_bytes(memory_limit)
    least = beside + fixed + largest * (params_buffer_count or 2)
    if limit < least:
        rule = f"must be at least {least:,} bytes: the largest block has {largest:,} bytes of"
        rule += f" parameters, and {kept:,} belong to no block and stay"
        if gradients_stay:
            rule += f", and so do {sum(moving):,} bytes of gradients, for the hooks that look there"
        way_out = "Raise it, lower sub_group_size, or choose smaller blocks with wrap_policy"
        raise argument_error(WHERE, "memory_limit", memory_limit, rule, way_out)
    free = limit - least
    gradients = gradients_stay or sum(moving) <= free
    if gradients and not gradients_stay:
        free -= sum(moving)
    more = free // largest if largest else 0
    count = params_buffer_count or min(2 + more, max(2, len(moving)))
    return Memory(count, gradients, group_bytes, limit - beside)
