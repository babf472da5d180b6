"""What a machine can do: FLOPs and bytes a second, and what it costs to call an operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lightning_align._compat.glibc_memory import NEVER_KEPT
from lightning_align._errors import argument_error, check_choice, finite_number
from lightning_align.planner.curves import Curve, class_of, interpolated, work_of
from lightning_align.planner.measure import measured
from lightning_align.planner.records import Checkpoint, Record
from lightning_align.planner.spec_sheets import check_dense, spec_sheet

WHERE = "MachineBalance"
# What launches a kernel and waits for the driver, of eager PyTorch on a GPU. Published timelines of
# small models have 4 to 10 microseconds between kernels.
GPU_OVERHEAD_S = 6e-6


@dataclass(frozen=True)
class MachineBalance:
    """What a machine can do. Made by ``measure`` or ``from_spec``.

    Attributes:
        name: Of the hardware.
        peak_flops: FLOP/s of products in the dtype it is about.
        mem_bandwidth: Bytes a second of main memory.
        source: Where the figures are from.
        dtype: Of the inputs of products.
        peaks: FLOP/s of products by dtype, as far as known.
        overheads: Seconds of an operation that has nothing to do, by phase of a step; None for all.
        checkpoint_s: Seconds of Python to recompute a region of ``torch.utils.checkpoint``, beside
            its operations; 0 where nothing was measured.
        checkpoint_saved_s: For each tensor that autograd would have saved there.
        curves: Class of operation -> seconds by work, as measured.
        softmax: Class of attention -> FLOPs of products that take as long as one of its softmax.
        is_asynchronous: Whether the next operation is prepared while one runs.
        cache_bandwidth: Bytes a second of what fits the caches, if measured.
        disk_bandwidth: Bytes a second of a drive, half of them written, if measured.
        fresh_bandwidth: Bytes a second of memory that is mapped, touched for the first time and
            given back, beside what writing it takes; None if unknown, or already in the curves.
        intervals: Name of a figure -> the lowest and highest that was measured.
    """

    name: str
    peak_flops: float
    mem_bandwidth: float
    source: str = "given"
    dtype: str = "float32"
    peaks: Mapping[str, float] = field(default_factory=dict)
    overheads: Mapping[str | None, float] = field(default_factory=lambda: {None: 0.0})
    checkpoint_s: float = 0.0
    checkpoint_saved_s: float = 0.0
    curves: Mapping[str, Curve] = field(default_factory=dict, repr=False)
    softmax: Mapping[str, float] = field(default_factory=dict, repr=False)
    is_asynchronous: bool = False
    cache_bandwidth: float | None = None
    disk_bandwidth: float | None = None
    fresh_bandwidth: float | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for argument in ("peak_flops", "mem_bandwidth"):
            value = getattr(self, argument)
            if (finite_number(value) or 0) <= 0:
                raise argument_error(WHERE, argument, value, "must be a positive, finite number")
        for phase, seconds in self.overheads.items():
            if (finite_number(seconds) is None) or seconds < 0:
                rule = f"of {phase or 'all phases'} must be finite, and not negative"
                raise argument_error(WHERE, "overheads", seconds, rule)
        for argument in ("checkpoint_s", "checkpoint_saved_s"):
            value = getattr(self, argument)
            if (finite_number(value) is None) or value < 0:
                raise argument_error(WHERE, argument, value, "must be finite, and not negative")

    @classmethod
    def measure(
        cls,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        disk: str | Path | None = None,
    ) -> MachineBalance:
        """Measure a device; takes about ten seconds, also of a dtype that it is slow with.

        On a processor with one thread CPU time is measured, so that what else runs there is not;
        otherwise the clock on the wall.

        Args:
            device: Which one.
            dtype: Of products and all else.
            disk: A folder on a drive to measure as well; 64 MB are written there and deleted.

        Raises:
            ValueError: If there is no such device, or it does not compute with that dtype.
        """
        return cls(**measured(device, dtype, disk))

    @classmethod
    def from_spec(
        cls,
        name: str,
        dtype: str | torch.dtype = "bfloat16",
        *,
        peak_flops: float | None = None,
        mem_bandwidth: float | None = None,
    ) -> MachineBalance:
        """What its maker says, dense.

        Args:
            name: For example ``"h100-sxm"``.
            dtype: Of the inputs of products: float32, tf32, bfloat16, float16 or float8.
            peak_flops: FLOP/s, in place of the sheet's.
            mem_bandwidth: Bytes a second, in place of the sheet's.

        Raises:
            ValueError: If hardware or dtype is not known, or the peak is one of sparse matrices.
        """
        where = f"{WHERE}.from_spec"
        full_name, sheet = spec_sheet(where, name)
        key = str(dtype).removeprefix("torch.")
        check_choice(where, "dtype", key, sheet.peak_flops)
        if peak_flops is not None:
            check_dense(where, full_name, key, peak_flops)
        return cls(
            name=full_name,
            peak_flops=sheet.peak_flops[key] if peak_flops is None else peak_flops,
            mem_bandwidth=sheet.mem_bandwidth if mem_bandwidth is None else mem_bandwidth,
            source=sheet.source,
            dtype=key,
            peaks=sheet.peak_flops,
            overheads={None: 0.0 if full_name.startswith("xeon") else GPU_OVERHEAD_S},
            is_asynchronous=not full_name.startswith("xeon"),
        )

    @property
    def ridge_point(self) -> float:
        """FLOPs a byte above which products are bound by arithmetic, and below by memory."""
        return self.peak_flops / self.mem_bandwidth

    def attainable_flops(self, intensity: float) -> float:
        """FLOP/s under the roofline.

        Args:
            intensity: FLOPs a byte.
        """
        return min(self.peak_flops, intensity * self.mem_bandwidth)

    def overhead(self, phase: str) -> float:
        """Seconds of an operation that has nothing to do.

        Args:
            phase: Of the step.
        """
        found = self.overheads.get(phase)
        return self.overheads.get(None, 0.0) if found is None else found

    def checkpoint_seconds(self, checkpoint: Checkpoint) -> float:
        """Seconds of a checkpoint's own Python; nothing where a device is busy meanwhile.

        Args:
            checkpoint: What ran again, and how much would have been saved.
        """
        if self.is_asynchronous:
            return 0.0
        return self.checkpoint_s + checkpoint.saved * self.checkpoint_saved_s

    def compute_seconds(self, record: Record) -> float:
        """Seconds of its products at the peak; other arithmetic never is what takes long."""
        if not record.flops:
            return 0.0
        dtype = str(record.dtype).removeprefix("torch.")
        peak = self.peak_flops if dtype == self.dtype else self.peaks.get(dtype, self.peak_flops)
        return record.flops / peak

    def memory_seconds(self, record: Record) -> float:
        """Seconds of its bytes at the bandwidth of memory."""
        return record.bytes / self.mem_bandwidth

    def fresh_seconds(self, record: Record) -> float:
        """Seconds of memory that it is the first to touch.

        The allocator keeps what is freed, as it does for the tensors of curves. Allocations of 32
        MiB and more are mapped each time, and the system fills their pages with zeros as they are
        touched.

        Args:
            record: The operation.
        """
        if self.fresh_bandwidth is None:
            return 0.0
        return sum(size for size in record.made if size >= NEVER_KEPT) / self.fresh_bandwidth

    def kernel_seconds(self, record: Record) -> float:
        """Seconds that it takes by itself: by the curve of its class, else by the roofline."""
        curve = self.curves.get(class_of(record))
        if curve is None:
            return max(self.compute_seconds(record), self.memory_seconds(record))
        seconds = interpolated(curve, work_of(record, self.softmax))
        # Curves of products are of many rows; of a few, as in decoding, the weights are what takes.
        return max(seconds, self.memory_seconds(record)) if record.flops else seconds
