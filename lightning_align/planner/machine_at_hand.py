"""The machine that a run is on: by its maker's sheet where the device has one, else measured."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import torch

from lightning_align.planner.balance import MachineBalance
from lightning_align.planner.spec_sheets import spec_sheet

# In one module with a processor, with less power, or a part of a device: other figures.
_OTHERS = ("gh200", "gb200", " nvl", " mig ", "laptop", "4090 d")
# Words of a device's name, as drivers tell it, and the sheet; the first that fits is taken.
_NAMES = (
    (("h100", "pcie"), "h100-pcie"),
    (("h100",), "h100-sxm"),
    (("h200",), "h200-sxm"),
    (("b200",), "b200-sxm"),
    (("a100", "sxm", "40gb"), "a100-sxm-40gb"),
    (("a100", "pcie", "80gb"), "a100-pcie-80gb"),
    (("a100", "sxm"), "a100-sxm-80gb"),
    (("mi300x",), "mi300x"),
    (("l40s",), "l40s"),
    (("4090",), "rtx-4090"),
    (("v100", "sxm2"), "v100-sxm2"),
)


def sheet_of(device_name: str) -> str | None:
    """Name of the sheet of a device; None if there is none, or it is not clear which.

    Args:
        device_name: As its driver tells it, ``"NVIDIA H100 80GB HBM3"``.
    """
    name = device_name.lower()
    if any(word in name for word in _OTHERS):
        return None
    return next((sheet for words, sheet in _NAMES if all(word in name for word in words)), None)


@cache
def machine_at_hand(device: torch.device, dtype: torch.dtype) -> MachineBalance:
    """What a device can do. Measuring takes about ten seconds, once in a process.

    Args:
        device: Which one.
        dtype: Of the inputs of products.
    """
    if device.type == "cuda":
        sheet = sheet_of(torch.cuda.get_device_name(device))
        if sheet is not None:
            return by_sheet(sheet, dtype)
    return MachineBalance.measure(device, dtype)


def by_sheet(name: str, dtype: torch.dtype) -> MachineBalance:
    """What the maker of hardware says, for products of a dtype; those in fp32 may be tf32.

    Args:
        name: Of the hardware.
        dtype: Of the inputs of products; where the sheet has none of it, fp32.

    Raises:
        ValueError: If the hardware is not known.
    """
    _, sheet = spec_sheet("MachineBalance.from_spec", name)
    key = str(dtype).removeprefix("torch.")
    if key in sheet.peak_flops and key != "float32":
        return MachineBalance.from_spec(name, key)
    found = MachineBalance.from_spec(name, "float32")
    if not _takes_tf32() or "tf32" not in sheet.peak_flops:
        return found
    return replace(found, peak_flops=sheet.peak_flops["tf32"])


def _takes_tf32() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # which torch raises where it was set by its newer name
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def memory_of(device: torch.device) -> float:
    """Bytes of a device's memory.

    Args:
        device: Which one.
    """
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
