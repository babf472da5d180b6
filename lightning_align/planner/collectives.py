"""Seconds of messages between devices.

Ranks lie as in Megatron-LM: those of tensor parallelism next to each other, then those of data
parallelism, then those of the pipeline. A ring moves 2 (n - 1) / n of the bytes through every link
(Patarasuk and Yuan 2009); small messages cost the steps of a tree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_align.planner.efficiencies import Efficiencies
from lightning_align.planner.hardware_spec import HardwareSpec


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other.

    Attributes:
        ranks: How many.
        stride: Devices from one to the next.
    """

    ranks: int
    stride: int = 1


def bandwidth(group: Group, hardware: HardwareSpec) -> float:
    """Bytes a second through each rank of a ring: of its slowest link.

    Ranks of a node leave it through all their adapters together, as NCCL has a ring for each.

    Args:
        group: Who talks.
        hardware: On what.
    """
    if group.ranks * group.stride <= hardware.devices_per_node:
        return hardware.intra_bandwidth
    inside = max(1, hardware.devices_per_node // group.stride)
    return min(hardware.intra_bandwidth, inside * hardware.inter_bandwidth)


def all_reduce_s(
    nbytes: float, group: Group, hardware: HardwareSpec, constants: Efficiencies
) -> float:
    """Seconds until every rank has the sum.

    Args:
        nbytes: Of the tensor.
        group: Who has a part of it.
        hardware: On what.
        constants: What is reached of its sheet.
    """
    if group.ranks == 1 or not nbytes:
        return 0.0
    share = 2 * (group.ranks - 1) / group.ranks
    seconds = share * nbytes / (bandwidth(group, hardware) * constants.link)
    return seconds + 2 * math.ceil(math.log2(group.ranks)) * constants.latency_s
