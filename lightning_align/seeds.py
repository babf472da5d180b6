"""Seeds that follow from what a draw belongs to, so that no generator state is ever saved."""

import hashlib
from contextlib import AbstractContextManager

import torch


def derive_seed(*parts: int | str) -> int:
    """A 64-bit seed from all that a draw may depend on; close parts, unrelated seeds."""
    key = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


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
