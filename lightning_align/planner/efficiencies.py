"""What hardware falls short of its sheet by: a few constants with units, bounds and sources.

Each has a value that is used where nothing was measured, a range that physics allows, and how far
the value may be off (a factor, one standard deviation). ``Planner.calibrate`` moves them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple


class Prior(NamedTuple):
    """What is known of a constant before anything is measured.

    Attributes:
        low: The least that is possible.
        high: The most.
        factor: By which the value may well be off.
    """

    low: float
    high: float
    factor: float


@dataclass(frozen=True)
class Efficiencies:
    """Constants of hardware and software.

    Attributes:
        matmul: Share of the peak that large products reach.
        half_depth: Elements of a product's inner side for which half of that is reached: a tile is
            loaded and stored whatever its depth.
        memory: Share of the bandwidth of memory that is reached.
        kernel_s: Seconds between two kernels on the device.
        launch_s: Seconds of the host to launch one.
        overlap: Power of the mean of host and device: 1 adds them, many take the longer.
        collective_s: Seconds of the host to launch a collective.
        link: Share of a link's bandwidth that collectives reach.
        latency_s: Seconds of one step of a ring.
        microbatch_s: Seconds of a micro-batch in a stage that are none of the above.
        step_s: Seconds of a step that are none of the above.
    """

    matmul: float = 0.80
    half_depth: float = 48.0
    memory: float = 0.80
    kernel_s: float = 2e-6
    launch_s: float = 2e-5
    overlap: float = 6.0
    collective_s: float = 4e-5
    link: float = 0.70
    latency_s: float = 8e-6
    microbatch_s: float = 2e-4
    step_s: float = 1e-3

    def told(self) -> dict[str, float]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


# matmul: cuBLAS reaches 250 to 290 of 312 TFLOP/s on an A100. memory: STREAM-like kernels reach 80
# to 90 %. launch_s: PyTorch needs 4 to 10 microseconds of C++, and several times that with autograd
# and Python's modules between. link: NCCL's rings reach 230 of 300 GB/s. latency_s: NCCL tests.
PRIORS: dict[str, Prior] = {
    "matmul": Prior(0.2, 1.0, 1.15),
    "half_depth": Prior(4.0, 512.0, 2.0),
    "memory": Prior(0.2, 1.0, 1.2),
    "kernel_s": Prior(1e-7, 2e-5, 2.0),
    "launch_s": Prior(1e-6, 2e-4, 3.0),
    "overlap": Prior(1.0, 32.0, 2.0),
    "collective_s": Prior(1e-6, 2e-3, 3.0),
    "link": Prior(0.02, 1.0, 1.5),
    "latency_s": Prior(5e-7, 5e-4, 2.0),
    "microbatch_s": Prior(1e-6, 2e-2, 3.0),
    "step_s": Prior(1e-5, 0.2, 5.0),
}


# What no hardware falls short of, for the least that a step can take.
IDEAL = Efficiencies(
    matmul=1.0,
    half_depth=1e-9,
    memory=1.0,
    kernel_s=0.0,
    launch_s=0.0,
    overlap=32.0,
    collective_s=0.0,
    link=1.0,
    latency_s=0.0,
    microbatch_s=0.0,
    step_s=0.0,
)


def measured_efficiencies(call_s: float) -> Efficiencies:
    """Constants of a processor that was measured: what was found is what is reached.

    Args:
        call_s: Seconds to call an operation.
    """
    return replace(IDEAL, launch_s=call_s, overlap=1.0)


def efficiencies_of(overhead_s: float, is_asynchronous: bool) -> Efficiencies:
    """Constants of hardware on which nothing was measured.

    Args:
        overhead_s: Seconds of the host to launch an operation.
        is_asynchronous: Whether it launches the next one while one runs; if not, both add up.
    """
    overlap = Efficiencies.overlap if is_asynchronous else 1.0
    return Efficiencies(launch_s=overhead_s, overlap=overlap)
