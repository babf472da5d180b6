"""Which sheet a device has, by the name that its driver tells."""

import pytest
import torch

from lightning_align.planner import MachineBalance
from lightning_align.planner.machine_at_hand import (
    by_sheet,
    machine_at_hand,
    memory_of,
    sheet_of,
)
from lightning_align.planner.spec_sheets import SPEC_SHEETS


@pytest.mark.parametrize(
    ("name", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("Tesla V100-SXM2-32GB", "v100-sxm2"),
        ("Tesla V100-PCIE-16GB", None),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA T4", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
    ],
)
def test_the_sheet_of_a_device(name: str, sheet: str | None) -> None:
    assert sheet_of(name) == sheet
    assert sheet is None or sheet in SPEC_SHEETS


def test_products_in_fp32_may_be_tf32() -> None:
    """A record in fp32 then takes what its peak says."""
    assert by_sheet("h100", torch.bfloat16).peak_flops == pytest.approx(989.4e12)
    assert by_sheet("h100", torch.float32).peak_flops == pytest.approx(66.9e12)
    assert by_sheet("v100", torch.bfloat16).dtype == "float32"  # it has no units for that
    torch.set_float32_matmul_precision("high")
    try:
        found = by_sheet("h100", torch.float32)
        assert by_sheet("v100", torch.float32).peak_flops == pytest.approx(15.7e12)
        assert by_sheet("l40s", torch.float32).peak_flops == pytest.approx(
            183e12
        )  # twice that of fp32, and dense
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found.dtype == "float32"
    assert found.peak_flops == pytest.approx(494.7e12)


def test_a_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    balance = MachineBalance("m", 1.0, 1.0)
    monkeypatch.setattr(MachineBalance, "measure", lambda *given: made.append(given) or balance)
    machine_at_hand.cache_clear()
    found = [machine_at_hand(torch.device("cpu"), torch.float32) for _ in range(2)]
    machine_at_hand.cache_clear()
    assert found == [balance, balance]
    assert made == [(torch.device("cpu"), torch.float32)]
    assert memory_of(torch.device("cpu")) > 1e8


def test_products_may_be_tf32_by_torchs_newer_name() -> None:
    """After which the older one cannot be asked."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        found = by_sheet("h100", torch.float32)
    finally:
        matmul.fp32_precision = before
    assert found.peak_flops == pytest.approx(494.7e12)
    assert torch.get_float32_matmul_precision() == "highest"
