"""Rooflines, curves and bad figures."""

import math
from typing import Any

import pytest
import torch

from lightning_align.planner import MachineBalance
from lightning_align.planner.records import Record


def record(name: str = "aten.mm", kind: str = "product", **more: Any) -> Record:
    given = {
        "phase": "forward",
        "scope": (),
        "flops": 0,
        "repeated_flops": 0,
        "bytes": 0,
        "pointwise_flops": 0,
        "reads": (),
        "writes": (),
        "dtype": torch.float32,
        "tensors": 1,
    }
    return Record(name=name, kind=kind, **{**given, **more})


def test_the_ridge_point_is_where_both_take_as_long() -> None:
    """989.4 TFLOP/s and 3.35 TB/s: 295 FLOPs a byte."""
    balance = MachineBalance.from_spec("h100-sxm")
    assert balance.ridge_point == pytest.approx(295.3, abs=0.1)
    assert balance.attainable_flops(balance.ridge_point) == balance.peak_flops
    assert balance.attainable_flops(1.0) == balance.mem_bandwidth
    assert balance.attainable_flops(1e6) == balance.peak_flops
    assert "NVIDIA" in balance.source


def test_a_product_takes_the_longer_of_arithmetic_and_bytes() -> None:
    balance = MachineBalance("m", peak_flops=1e9, mem_bandwidth=1e6)
    assert balance.kernel_seconds(record(flops=2 * 10**9, bytes=10)) == 2
    assert balance.kernel_seconds(record(flops=10, bytes=3 * 10**6)) == 3


def test_the_peak_is_that_of_the_dtype() -> None:
    balance = MachineBalance.from_spec("a100", "bfloat16")
    work = {"flops": 312 * 10**12, "bytes": 1}
    assert balance.compute_seconds(record(dtype=torch.bfloat16, **work)) == 1
    assert balance.compute_seconds(record(dtype=torch.float32, **work)) == 16


def test_operations_have_the_curve_of_their_class() -> None:
    curves = {"norm backward": [(1.0, 7.0)], "move": [(1.0, 3.0)], "product": [(1.0, 5.0)]}
    balance = MachineBalance("m", 1e9, 1e9, curves=curves)
    norm = record("aten.native_layer_norm_backward", "norm", bytes=1)
    assert balance.kernel_seconds(norm) == 7
    assert balance.kernel_seconds(record("aten.clone", "move", bytes=1)) == 3
    assert balance.kernel_seconds(record(flops=2, bytes=10**9)) == 10  # by its FLOPs
    assert balance.kernel_seconds(record(flops=1, bytes=7 * 10**9)) == 7  # few rows: by its bytes
    assert balance.kernel_seconds(record("aten.add", "pointwise", bytes=10**9)) == 1  # no curve


@pytest.mark.parametrize("figure", ["peak_flops", "mem_bandwidth"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1e12", None])
def test_figures_must_be_positive(figure: str, value: Any) -> None:
    given: dict[str, Any] = {"peak_flops": 1e9, "mem_bandwidth": 1e9, figure: value}
    with pytest.raises(ValueError, match=rf"MachineBalance\({figure}=.*positive, finite"):
        MachineBalance("m", **given)


@pytest.mark.parametrize("argument", ["checkpoint_s", "checkpoint_saved_s"])
@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_python_of_checkpoints_must_be_a_time(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{argument}={value}.*must be finite, and not negative"):
        MachineBalance("m", 1.0, 1.0, **{argument: value})


def test_overheads_must_be_times() -> None:
    with pytest.raises(ValueError, match=r"overheads=nan.*of forward must be finite"):
        MachineBalance("m", 1.0, 1.0, overheads={"forward": math.nan})


def test_what_a_sheet_does_not_have_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"dtype='bfloat16'\): must be one of 'float32', 'float16'"
    ):
        MachineBalance.from_spec("v100", "bfloat16")
    with pytest.raises(ValueError, match=r"from_spec\(peak_flops=1979000000000000\.0\).*sparse"):
        MachineBalance.from_spec("h100", peak_flops=1979e12)
    with pytest.raises(ValueError, match=r"peak_flops=nan"):
        MachineBalance.from_spec("h100", peak_flops=math.nan)
    own = MachineBalance.from_spec("h100", torch.float16, peak_flops=800e12, mem_bandwidth=3e12)
    assert (own.peak_flops, own.mem_bandwidth, own.dtype) == (800e12, 3e12, "float16")
