"""What makers of hardware say that it can do: dense figures, each with its source.

FLOP/s are those of products whose inputs have the dtype named, by the fastest units that there are,
with sums in fp32 where there is a choice. Many sheets print figures for matrices of which half are
zeros (structured sparsity), which are twice as high; training never sees those.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lightning_align._errors import argument_error

FP32, TF32, BF16, FP16, FP8 = "float32", "tf32", "bfloat16", "float16", "float8"
SPARSE_TOLERANCE = 0.03  # of a peak, within which it is taken for twice the dense one


@dataclass(frozen=True)
class SpecSheet:
    """What a maker says.

    Attributes:
        peak_flops: Dense FLOP/s of products, by dtype of their inputs.
        mem_bandwidth: Bytes a second of its main memory.
        memory: Bytes of main memory.
        source: Where the figures are from.
        has_sparsity: Whether its sheet has figures for sparse matrices, too.
    """

    peak_flops: dict[str, float]
    mem_bandwidth: float
    memory: float
    source: str
    has_sparsity: bool = True


def _tera(**peaks: float) -> dict[str, float]:
    return {dtype: 1e12 * peak for dtype, peak in peaks.items()}


_HOPPER = _tera(float32=66.9, tf32=494.7, bfloat16=989.4, float16=989.4, float8=1978.9)
_AMPERE = _tera(float32=19.5, tf32=156, bfloat16=312, float16=312)
_A100_SHEET = "NVIDIA A100 Tensor Core GPU datasheet, 2021"
_H100_SHEET = "NVIDIA H100 Tensor Core GPU datasheet, 2023 (printed with sparsity, halved)"

SPEC_SHEETS: dict[str, SpecSheet] = {
    "a100-sxm-80gb": SpecSheet(_AMPERE, 2.039e12, 80e9, _A100_SHEET),
    "a100-sxm-40gb": SpecSheet(_AMPERE, 1.555e12, 40e9, _A100_SHEET),
    "a100-pcie-80gb": SpecSheet(_AMPERE, 1.935e12, 80e9, _A100_SHEET),
    "h100-sxm": SpecSheet(_HOPPER, 3.35e12, 80e9, _H100_SHEET),
    "h100-pcie": SpecSheet(
        _tera(float32=51.2, tf32=378, bfloat16=756, float16=756, float8=1513),
        *(2.0e12, 80e9, _H100_SHEET),
    ),
    "h200-sxm": SpecSheet(
        *(_HOPPER, 4.8e12, 141e9),
        "NVIDIA H200 Tensor Core GPU datasheet, 2024 (printed with sparsity, halved)",
    ),
    "b200-sxm": SpecSheet(
        _tera(float32=80, tf32=1100, bfloat16=2250, float16=2250, float8=4500),
        *(8.0e12, 180e9),
        "NVIDIA Blackwell architecture technical brief, 2024, HGX B200, a GPU of eight",
    ),
    "mi300x": SpecSheet(
        _tera(float32=163.4, tf32=653.7, bfloat16=1307.4, float16=1307.4, float8=2614.9),
        *(5.3e12, 192e9, "AMD Instinct MI300X accelerator datasheet, 2023"),
    ),
    "l40s": SpecSheet(
        _tera(float32=91.6, tf32=183, bfloat16=362.05, float16=362.05, float8=733),
        *(864e9, 48e9, "NVIDIA L40S GPU datasheet, 2023 (both figures printed)"),
    ),
    "rtx-4090": SpecSheet(
        _tera(float32=82.6, tf32=82.6, bfloat16=165.2, float16=165.2, float8=330.3),
        *(1.008e12, 24e9, "NVIDIA Ada GPU architecture whitepaper, appendix A, sums in fp32"),
    ),
    "v100-sxm2": SpecSheet(
        _tera(float32=15.7, float16=125),
        *(900e9, 32e9, "NVIDIA V100 Tensor Core GPU datasheet, 2020"),
        has_sparsity=False,
    ),
    # 56 cores x 2 units x 16 lanes x 2 FLOPs at 2.0 GHz; tiles: 1024 products a cycle and core
    "xeon-8480": SpecSheet(
        _tera(float32=7.17, bfloat16=229.4),
        *(307.2e9, 512e9, "Intel ARK, Xeon Platinum 8480+: cores, base clock, 8 x DDR5-4800"),
        has_sparsity=False,
    ),
}
_ALIASES = {
    "a100": "a100-sxm-80gb",
    "a100-sxm": "a100-sxm-80gb",
    "a100-pcie": "a100-pcie-80gb",
    "h100": "h100-sxm",
    "h200": "h200-sxm",
    "b200": "b200-sxm",
    "v100": "v100-sxm2",
    "4090": "rtx-4090",
    "rtx4090": "rtx-4090",
    "mi300": "mi300x",
    "cpu": "xeon-8480",
}


def spec_sheet(where: str, name: str, argument: str = "name") -> tuple[str, SpecSheet]:
    """The full name of hardware and its sheet.

    Args:
        where: What the user called.
        name: Of the hardware, in any case; the most common variant may be left out.
        argument: What the user gave the name as.

    Raises:
        ValueError: If there is none of that name.
    """
    key = str(name).lower().replace("_", "-").replace(" ", "-")
    key = _ALIASES.get(key, key)
    if key not in SPEC_SHEETS:
        close = difflib.get_close_matches(key, [*SPEC_SHEETS, *_ALIASES], n=1, cutoff=0.5)
        guess = f"Did you mean {_ALIASES.get(close[0], close[0])!r}? " if close else ""
        way_out = f"{guess}Measure other hardware with MachineBalance.measure"
        rule = f"must be one of {', '.join(map(repr, SPEC_SHEETS))}"
        raise argument_error(where, argument, name, rule, way_out)
    return key, SPEC_SHEETS[key]


def check_dense(where: str, name: str, dtype: str, peak_flops: float) -> None:
    """Refuse a peak that is of sparse matrices.

    Args:
        where: What the user called.
        name: Full name of the hardware.
        dtype: Of the inputs of products.
        peak_flops: What the user gave.

    Raises:
        ValueError: If it is twice the dense peak.
    """
    sheet = SPEC_SHEETS[name]
    dense = sheet.peak_flops[dtype]
    if sheet.has_sparsity and abs(peak_flops / (2 * dense) - 1) < SPARSE_TOLERANCE:
        rule = f"is the peak of {name} for sparse matrices; that of dense ones is {dense:.4g}"
        raise argument_error(where, "peak_flops", peak_flops, rule, "Leave it out")
