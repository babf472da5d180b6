"""Randomness as a function of the position: nothing to save, nothing to restore.

Saving generator states is not enough for an exact resume: whatever draws between the save and the
next batch (a validation run, the start of a data loader) shifts them. Seeding from (seed, position,
rank, stage) before every batch makes the draws of batch n the same however the run came to it.
"""

import random
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from lightning_align.seeds import derive_seed


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


def fork_generators(device: torch.device) -> AbstractContextManager[None]:
    """Context behind which torch's generators (of the CPU and ``device``) are as they were."""
    devices = [] if device.type == "cpu" else [device]
    return torch.random.fork_rng(devices, device_type=device.type if devices else "cuda")


def seed_torch(seed: int) -> None:
    """Seed the CPU's generator and those of the accelerator in use.

    ``torch.manual_seed`` means every kind of device: for each of CUDA, XPU and MTIA that has not
    been started it notes the caller's stack, which takes half a millisecond at every step.
    """
    torch.default_generator.manual_seed(seed)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        device_module = torch.get_device_module(accelerator)
        # MPS has one device, and no function for all.
        getattr(device_module, "manual_seed_all", device_module.manual_seed)(seed)


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
