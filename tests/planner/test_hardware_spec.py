"""Hardware by name and by figures."""

import math
from typing import Any

import pytest
import torch

from lightning_align.planner import HardwareSpec, MachineBalance, hardware_spec
from lightning_align.planner.few_rows import FewRows
from lightning_align.planner.spec_sheets import SPEC_SHEETS

HALF = torch.bfloat16
GIVEN = {"peak_flops": "989TFLOPS", "mem_bandwidth": "3.35TB/s", "memory": "80GB"}


def test_figures_with_units() -> None:
    spec = HardwareSpec(**GIVEN, cpu_memory="2TB", intra_bandwidth="450GB/s")  # type: ignore[arg-type]
    assert (spec.peak_flops, spec.memory, spec.cpu_memory) == (989e12, 80e9, 2e12)
    assert spec.intra_bandwidth == 450e9


def test_a_name_has_a_number_before_it() -> None:
    spec = HardwareSpec.from_name("16xH100")
    assert (spec.name, spec.devices, spec.devices_per_node, spec.nodes) == ("h100-sxm", 16, 8, 2)
    assert spec.source
    assert HardwareSpec.from_name("l40s").devices == 1
    assert HardwareSpec.from_name("h100-sxm", price_per_hour=2.5).price_per_hour == 2.5


@pytest.mark.parametrize("name", SPEC_SHEETS)
def test_every_sheet_has_a_node_with_a_source(name: str) -> None:
    spec = HardwareSpec.from_name(name)
    assert spec.intra_bandwidth >= spec.inter_bandwidth > 0
    assert spec.cpu_memory > 0
    assert ";" in spec.source


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"memory": "80"}, ""),
        ({"memory": "80GB/s"}, "memory='80GB/s'.*finite number of bytes"),
        ({"peak_flops": 0}, "peak_flops=0.*must be positive"),
        ({"peak_flops": math.nan}, "peak_flops=nan.*finite"),
        ({"mem_bandwidth": -1}, "mem_bandwidth=-1.*must be positive"),
        ({"devices_per_node": 0}, "devices_per_node=0.*at least 1"),
        ({"devices": 2.5}, "devices=2.5.*whole number"),
        ({"price_per_hour": -1}, "price_per_hour=-1.*not negative"),
    ],
)
def test_impossible_figures_are_refused(changes: dict[str, Any], told: str) -> None:
    if not told:  # a bare number is in bytes
        assert HardwareSpec(**{**GIVEN, **changes}).memory == 80
        return
    with pytest.raises(ValueError, match=told):
        HardwareSpec(**{**GIVEN, **changes})


def test_products_in_fp32_are_those_of_torch_as_it_is() -> None:
    """It has TF32 only if asked to."""
    assert HardwareSpec.from_name("a100").product_flops(is_half=False) == 19.5e12
    assert HardwareSpec.from_name("a100", fp32_flops="156TFLOPS").fp32_flops == 156e12


def test_what_was_measured_is_what_is_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def measure(device: Any, **given: Any) -> MachineBalance:
        asked.update(device=str(device), **given)
        found: dict[str, Any] = {"overheads": {None: 1e-6, "forward": 3e-6}, "disk_bandwidth": 2e9}
        return MachineBalance("m", 1e11, 5e10, fresh_bandwidth=3e9, **found)

    monkeypatch.setattr(MachineBalance, "measure", measure)
    monkeypatch.setattr(hardware_spec, "product_peak", lambda _, dtype: {HALF: 3e11}[dtype])
    few = {
        torch.float32: FewRows(((1.0, 1.0),), 1.0, 1e-6),
        HALF: FewRows(((1.0, 0.5),), 1.0, 1e-6),
    }

    def few_rows_of(peaks: Any, memory: float, cache: float) -> list[FewRows]:
        assert (peaks, memory, cache) == ({torch.float32: 1e11, HALF: 3e11}, 5e10, 5e10)
        return [few[dtype] for dtype in peaks]

    monkeypatch.setattr(hardware_spec, "few_rows_of", few_rows_of)
    spec = HardwareSpec.measure("cpu", disk="here", devices=2, price_per_hour=1.5)
    assert asked == {"device": "cpu", "disk": "here"}
    assert (spec.peak_flops, spec.fp32_flops, spec.mem_bandwidth) == (3e11, 1e11, 5e10)
    assert (spec.nvme_read_bandwidth, spec.nvme_write_bandwidth) == (2e9, 2e9)
    assert spec.fresh_bandwidth == 3e9
    assert [spec.few_rows, spec.few_rows_half] == list(few.values())
    assert (spec.overhead_s, spec.is_asynchronous) == (3e-6, False)
    assert (spec.devices, spec.price_per_hour, spec.source) == (2, 1.5, "measured")
    assert 2 * spec.memory == spec.cpu_memory > 1e8  # two processes share the host's
    with pytest.raises(ValueError, match="Did you mean devices"):
        HardwareSpec.measure("cpu", device_count=2)


def test_unknown_names_and_keys() -> None:
    with pytest.raises(ValueError, match="Did you mean 'h100-sxm'"):
        HardwareSpec.from_name("8xh10-sxm")
    with pytest.raises(ValueError, match="at least one device"):
        HardwareSpec.from_name("0xh100")
    with pytest.raises(ValueError, match=r"vram=1.*must be one of peak_flops.*source\.$"):
        HardwareSpec.from_name("h100", vram=1)
    with pytest.raises(ValueError, match="Did you mean mem_bandwidth"):
        HardwareSpec.from_name("h100", memory_bandwith=1)


def test_a_peak_of_sparse_matrices_is_recognised() -> None:
    with pytest.raises(ValueError, match="for sparse matrices; that of dense ones is"):
        HardwareSpec.from_name("h100", peak_flops="1979TFLOPS")


def test_processes_on_a_processor_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def measured(*_: object, **__: object) -> MachineBalance:
        threads.append(torch.get_num_threads())
        return MachineBalance.from_spec("xeon-8480")

    monkeypatch.setattr(MachineBalance, "measure", measured)
    monkeypatch.setattr(hardware_spec, "product_peak", lambda *_: 1e11)
    monkeypatch.setattr(hardware_spec, "few_rows_of", lambda *_: [None, None])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    one, two = HardwareSpec.measure(), HardwareSpec.measure(devices=2)
    assert [each for each in threads if each != 4] == [2]
    assert two.memory == one.memory / 2 == one.cpu_memory / 2
    assert (two.devices, two.devices_per_node, two.nodes) == (2, 2, 1)
    with pytest.raises(ValueError, match=r"devices=0.*at least 1"):
        HardwareSpec.measure(devices=0)
