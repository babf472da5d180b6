"""Randomness as a function of the position: nothing to save, nothing to restore.

Saving generator states is not enough for an exact resume: whatever draws between the save and the
next batch (a validation run, the start of a data loader) shifts them. Seeding from (seed, position,
rank, stage) before every batch makes the draws of batch n the same however the run came to it.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lightning_align.seeds import derive_seed, fork_generators, seed_torch


def reseed(seed: int, position: int, rank: int, stage: str) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices) for one batch.

    Args:
        seed: Seed of the run.
        position: Batches consumed before this one.
        rank: Global rank of this process, so that ranks drop different units.
        stage: ``"train"`` or ``"validate"``, so that validation does not replay training's draws.
    """
    derived = derive_seed(seed, position, rank, stage)
    random.seed(derived)
    np.random.seed(derived & 0xFFFF_FFFF)  # NumPy's legacy generator takes 32 bits
    seed_torch(derived)


@contextmanager
def undrawn(device: torch.device) -> Iterator[None]:
    """Context behind which all generators, also those of ``device``, are as they were."""
    states = random.getstate(), np.random.get_state()
    try:
        with fork_generators(device):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def generator_state(value: Any) -> Any:
    """State of a generator of Python, NumPy or torch; None of anything else."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    return value.bit_generator.state if isinstance(value, np.random.Generator) else None


def set_generator_state(value: Any, state: Any) -> None:
    """Put back what ``generator_state`` gave."""
    if isinstance(value, random.Random):
        value.setstate(state)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    else:
        value.set_state(state)
