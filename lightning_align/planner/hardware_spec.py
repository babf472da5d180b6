"""What a planner must know of hardware: a device, what connects it, what is beside it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from lightning_align._errors import argument_error, check_least, check_whole, finite_number
from lightning_align.planner.balance import MachineBalance
from lightning_align.planner.efficiencies import Efficiencies
from lightning_align.planner.few_rows import FewRows
from lightning_align.planner.measure import few_rows_of, product_peak
from lightning_align.planner.nodes import NODES
from lightning_align.planner.quantities import BYTES, BYTES_A_SECOND, FLOPS, quantity
from lightning_align.planner.spec_sheets import SPEC_SHEETS, check_dense, spec_sheet

WHERE = "HardwareSpec"
_UNITS = {
    "peak_flops": FLOPS,
    "mem_bandwidth": BYTES_A_SECOND,
    "memory": BYTES,
    "intra_bandwidth": BYTES_A_SECOND,
    "inter_bandwidth": BYTES_A_SECOND,
    "cpu_memory": BYTES,
    "nvme_read_bandwidth": BYTES_A_SECOND,
    "nvme_write_bandwidth": BYTES_A_SECOND,
    "host_bandwidth": BYTES_A_SECOND,
    "fresh_bandwidth": BYTES_A_SECOND,
    "fp32_flops": FLOPS,
}
_MAY_BE_ZERO = ("cpu_memory", "nvme_read_bandwidth", "nvme_write_bandwidth")
_MAY_BE_NONE = ("fresh_bandwidth", "fp32_flops")


@dataclass(frozen=True)
class HardwareSpec:
    """Devices and what connects them. Numbers are in SI; texts have units, such as ``"80GB"``.

    Args:
        peak_flops: Dense FLOP/s of a device, of products with 16-bit inputs.
        mem_bandwidth: Bytes a second of its memory.
        memory: Bytes of its memory.
        intra_bandwidth: Bytes a second, one way, between devices of a node.
        inter_bandwidth: Bytes a second, one way, of a device to other nodes.
        devices_per_node: Devices of a node.
        cpu_memory: Bytes of a node's host memory.
        nvme_read_bandwidth: Bytes a second of a node's drives; 0 if it has none.
        nvme_write_bandwidth: The same, written.
        price_per_hour: Of one device, in any currency; None if it does not matter.
        host_bandwidth: Bytes a second between a device and host memory.
        fresh_bandwidth: Bytes a second of host memory that is touched for the first time; None
            leaves out what that costs a processor.
        fp32_flops: FLOP/s of products in fp32; None is an eighth of ``peak_flops``. Names have it
            without TF32, which torch uses only if told to.
        few_rows: What a processor reaches of the roofline with few rows in fp32, as measured; None
            takes all of it.
        few_rows_half: The same in bf16.
        overhead_s: Seconds of the host to launch an operation, from Python.
        is_asynchronous: Whether the host prepares the next operation while one runs.
        devices: How many there are.
        name: For messages.
        source: Where the figures are from.

    Raises:
        ValueError: If a figure is not positive and finite, or its unit is another.

    Example:
        >>> HardwareSpec.from_name("8xh100-sxm").devices
        8
    """

    peak_flops: float
    mem_bandwidth: float
    memory: float
    intra_bandwidth: float = 32e9
    inter_bandwidth: float = 1.25e9
    devices_per_node: int = 8
    cpu_memory: float = 0.0
    nvme_read_bandwidth: float = 0.0
    nvme_write_bandwidth: float = 0.0
    price_per_hour: float | None = None
    host_bandwidth: float = 32e9
    fresh_bandwidth: float | None = None
    fp32_flops: float | None = None
    few_rows: FewRows | None = field(default=None, repr=False)
    few_rows_half: FewRows | None = field(default=None, repr=False)
    overhead_s: float = Efficiencies.launch_s
    is_asynchronous: bool = True
    devices: int = 1
    name: str = "given"
    source: str = field(default="given", compare=False)

    def __post_init__(self) -> None:
        for argument, unit in _UNITS.items():
            if (given := getattr(self, argument)) is None and argument in _MAY_BE_NONE:
                continue
            value = quantity(WHERE, argument, given, unit, zero=argument in _MAY_BE_ZERO)
            object.__setattr__(self, argument, value)
        for argument in ("devices_per_node", "devices"):
            if type(getattr(self, argument)) is not int:
                value = getattr(self, argument)
                raise argument_error(WHERE, argument, value, "must be a whole number")
        check_least(WHERE, 1, devices_per_node=self.devices_per_node, devices=self.devices)
        for argument in ("price_per_hour", "overhead_s"):
            given = getattr(self, argument)
            if given is not None and ((finite_number(given) is None) or given < 0):
                rule = "must be a finite number, and not negative"
                raise argument_error(WHERE, argument, given, rule)

    @classmethod
    def from_name(cls, name: str, **changes: Any) -> HardwareSpec:
        """By the name of a device, with a number before it: ``"8xh100-sxm"``.

        Args:
            name: For example ``"a100-sxm-80gb"`` or ``"8xh100-sxm"``.
            **changes: Arguments of ``HardwareSpec`` in place of the sheets'.

        Raises:
            ValueError: If it is not known, or a peak is one of sparse matrices.
        """
        where = f"{WHERE}.from_name"
        found = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(.+?)\s*", str(name), re.IGNORECASE)
        key, sheet = spec_sheet(where, found[2] if found else name)
        if found and found[1] and int(found[1]) < 1:
            raise argument_error(where, "name", name, "must have at least one device")
        _check_known(where, changes)
        half = "bfloat16" if "bfloat16" in sheet.peak_flops else "float16"
        if "peak_flops" in changes:
            given = quantity(where, "peak_flops", changes["peak_flops"], FLOPS)
            check_dense(where, key, half, given)
        node = NODES[key]
        figures: dict[str, Any] = {
            "peak_flops": sheet.peak_flops[half],
            "mem_bandwidth": sheet.mem_bandwidth,
            "memory": sheet.memory,
            "intra_bandwidth": node.intra_bandwidth,
            "inter_bandwidth": node.inter_bandwidth,
            "devices_per_node": node.devices,
            "cpu_memory": node.cpu_memory,
            "nvme_read_bandwidth": node.nvme_read_bandwidth,
            "nvme_write_bandwidth": node.nvme_write_bandwidth,
            "host_bandwidth": node.host_bandwidth,
            "fp32_flops": sheet.peak_flops["float32"],
            "is_asynchronous": not key.startswith("xeon"),
            "devices": int(found[1]) if found and found[1] else 1,
            "name": key,
            "source": f"{sheet.source}; {node.source}",
        }
        return cls(**{**figures, **changes})

    @classmethod
    def measure(
        cls, device: str | torch.device = "cpu", *, disk: str | Path | None = None, **changes: Any
    ) -> HardwareSpec:
        """Of the machine at hand; takes about ten seconds.

        Several devices of a processor are processes that share its threads and its memory.

        Args:
            device: Which one.
            disk: A folder on a drive to measure as well.
            **changes: Arguments of ``HardwareSpec`` in place of what was measured.

        Raises:
            ValueError: If there is no such device, or their number is none.
        """
        _check_known(f"{WHERE}.measure", changes)
        device = torch.device(device)
        is_cpu = device.type == "cpu"
        count, threads = changes.get("devices", 1), torch.get_num_threads()
        check_whole(f"{WHERE}.measure", devices=count)
        check_least(f"{WHERE}.measure", 1, devices=count)
        shares = count if is_cpu else 1
        torch.set_num_threads(max(1, threads // shares))
        try:
            found = MachineBalance.measure(device, disk=disk)
            half_flops = product_peak(device, torch.bfloat16)
            peaks = {torch.float32: found.peak_flops, torch.bfloat16: half_flops}
            cache = found.cache_bandwidth or found.mem_bandwidth
            few = few_rows_of(peaks, found.mem_bandwidth, cache) if is_cpu else [None, None]
        finally:
            torch.set_num_threads(threads)
        host = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        memory = host if is_cpu else float(torch.cuda.get_device_properties(device).total_memory)
        drive = found.disk_bandwidth or 0.0
        figures: dict[str, Any] = {
            "peak_flops": half_flops,
            "mem_bandwidth": found.mem_bandwidth,
            "memory": memory / shares,
            "intra_bandwidth": found.mem_bandwidth / 2 if is_cpu else 32e9,
            "devices_per_node": count if is_cpu else torch.cuda.device_count(),
            "cpu_memory": host,
            "nvme_read_bandwidth": drive,
            "nvme_write_bandwidth": drive,
            "host_bandwidth": found.mem_bandwidth if is_cpu else 32e9,
            "fresh_bandwidth": found.fresh_bandwidth,
            "fp32_flops": found.peak_flops,
            "few_rows": few[0],
            "few_rows_half": few[1],
            "overhead_s": found.overhead("forward"),
            "is_asynchronous": not is_cpu,
            "name": f"this {device.type}",
            "source": "measured",
        }
        return cls(**{**figures, **changes})

    @property
    def nodes(self) -> int:
        """Nodes that the devices need."""
        return -(-self.devices // self.devices_per_node)

    def of(self, devices: int) -> HardwareSpec:
        """The same with another number of devices."""
        return replace(self, devices=devices)

    def product_flops(self, is_half: bool) -> float:
        """FLOP/s of products with 16-bit inputs, or in fp32."""
        if is_half:
            return self.peak_flops
        return self.peak_flops / 8 if self.fp32_flops is None else self.fp32_flops


def _check_known(where: str, changes: Mapping[str, Any]) -> None:
    known = [each.name for each in fields(HardwareSpec)]
    for argument, value in changes.items():
        if argument not in known:
            rule = f"must be one of {', '.join(known)}"
            close = difflib.get_close_matches(argument, known, n=1)
            way_out = f"Did you mean {close[0]}" if close else ""
            raise argument_error(where, argument, value, rule, way_out)


assert set(NODES) == set(SPEC_SHEETS), "a sheet without a node, or the other way round"
