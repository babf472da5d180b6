"""What connects devices, and what is beside them in a node: figures of makers, with their source.

Bandwidths are of one direction and one device; those of memory and drives are of the whole node.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A node of the usual make.

    Attributes:
        devices: In it.
        intra_bandwidth: Bytes a second of a device to its neighbours in the node.
        inter_bandwidth: Bytes a second of a device to other nodes.
        host_bandwidth: Bytes a second between a device and host memory.
        cpu_memory: Bytes of host memory.
        nvme_read_bandwidth: Bytes a second of all drives together.
        nvme_write_bandwidth: The same, written.
        source: Where the figures are from.
    """

    devices: int
    intra_bandwidth: float
    inter_bandwidth: float
    host_bandwidth: float
    cpu_memory: float
    nvme_read_bandwidth: float
    nvme_write_bandwidth: float
    source: str


_GEN4, _GEN5 = 32e9, 64e9  # PCI Express, 16 lanes
_ONE_DRIVE = (7.0e9, 5.0e9)  # of PCI Express 4, four lanes, as datasheets of drives have it
_DGX_A100 = "NVIDIA DGX A100 datasheet: NVLink 600 GB/s both ways, eight 200 Gb/s adapters"
_DGX_H100 = "NVIDIA DGX H100 datasheet: NVLink 900 GB/s both ways, eight 400 Gb/s adapters"

NODES: dict[str, Node] = {
    "a100-sxm-80gb": Node(8, 300e9, 25e9, _GEN4, 2e12, 25e9, 20e9, _DGX_A100),
    "a100-sxm-40gb": Node(8, 300e9, 25e9, _GEN4, 1e12, 25e9, 20e9, _DGX_A100),
    "a100-pcie-80gb": Node(8, _GEN4, 12.5e9, _GEN4, 1e12, *_ONE_DRIVE, "PCI Express 4, 16 lanes"),
    "h100-sxm": Node(8, 450e9, 50e9, _GEN5, 2e12, 50e9, 40e9, _DGX_H100),
    "h100-pcie": Node(8, _GEN5, 25e9, _GEN5, 1e12, *_ONE_DRIVE, "PCI Express 5, 16 lanes"),
    "h200-sxm": Node(8, 450e9, 50e9, _GEN5, 2e12, 50e9, 40e9, _DGX_H100),
    "b200-sxm": Node(
        *(8, 900e9, 50e9, _GEN5, 2e12, 50e9, 40e9),
        "NVIDIA DGX B200 datasheet: NVLink 1.8 TB/s both ways, eight 400 Gb/s adapters",
    ),
    "mi300x": Node(
        *(8, 448e9, 50e9, _GEN5, 2e12, 50e9, 40e9),
        "AMD Instinct MI300X platform datasheet: 896 GB/s both ways to seven neighbours",
    ),
    "l40s": Node(8, _GEN4, 12.5e9, _GEN4, 1e12, *_ONE_DRIVE, "PCI Express 4, 16 lanes"),
    "rtx-4090": Node(
        *(8, _GEN4, 1.25e9, _GEN4, 128e9, *_ONE_DRIVE),
        "PCI Express 4, 16 lanes; ethernet of 10 Gb/s",
    ),
    "v100-sxm2": Node(
        *(8, 150e9, 6.25e9, 16e9, 512e9, *_ONE_DRIVE),
        "NVIDIA DGX-1 V100 whitepaper: NVLink 300 GB/s both ways, four 100 Gb/s adapters",
    ),
    "xeon-8480": Node(
        *(2, 48e9, 12.5e9, 307.2e9, 512e9, *_ONE_DRIVE),
        "Intel ARK, Xeon Platinum 8480+: UPI of 16 GT/s; ethernet of 100 Gb/s",
    ),
}
