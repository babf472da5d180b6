"""Which documents or prompts are held out: as a whole, and drawn by the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lightning_align._errors import argument_error

Sample = TypeVar("Sample")


def hold_out_prompts(
    where: str,
    samples: Sequence[Sample],
    prompts: Sequence[Hashable],
    val_fraction: float,
    seed: int,
) -> tuple[list[Sample], list[Sample]]:
    """Samples to learn from, and samples held out; those with the same prompt stay together.

    Args:
        where: Class the user called.
        samples: Samples to divide.
        prompts: What tells the prompt of each sample from others.
        val_fraction: Part of the prompts to hold out, in [0, 1).
        seed: Seed of the draw.
    """
    numbers: dict[Hashable, int] = {}
    group = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
    held_out = draw_held_out(
        where, len(numbers), val_fraction, seed, what="prompts", way_out="Set val_paths instead"
    )
    train = [one for one, number in zip(samples, group, strict=True) if not held_out[number]]
    val = [one for one, number in zip(samples, group, strict=True) if held_out[number]]
    return train, val


def draw_held_out(
    where: str, number: int, val_fraction: float, seed: int, *, what: str, way_out: str
) -> NDArray[np.bool_]:
    """One flag per item; at least one item is held out and at least one is not.

    Args:
        where: Class the user called.
        number: Number of items to draw from.
        val_fraction: Part to hold out, in [0, 1); 0 holds out nothing.
        seed: Seed of the draw.
        what: The items in a word, for the error.
        way_out: What to do about a single item, for the error.

    Raises:
        ValueError: If one should be held out and there is only one.
    """
    held_out = np.zeros(number, dtype=np.bool_)
    if val_fraction == 0:
        return held_out
    if number == 1:
        rule = f"holds out whole {what}, and there is only one"
        raise argument_error(where, "val_fraction", val_fraction, rule, way_out)
    size = min(max(round(val_fraction * number), 1), number - 1)
    digest = hashlib.blake2b(f"held out,{seed}".encode(), digest_size=16).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "big"))
    held_out[generator.choice(number, size, replace=False)] = True
    return held_out
