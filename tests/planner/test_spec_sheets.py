"""Figures of hardware: dense, each with a source, found by any usual name."""

import pytest

from lightning_align.planner.spec_sheets import SPEC_SHEETS, check_dense, spec_sheet


def test_the_hardware_that_people_ask_for_is_there() -> None:
    asked = ["A100", "H100", "H200", "B200", "MI300X", "L40S", "RTX 4090", "V100", "cpu"]
    names = [spec_sheet("f", name)[0] for name in asked]
    assert len(set(names)) == len(asked)
    assert spec_sheet("f", "h100_sxm") == spec_sheet("f", "H100-SXM")


@pytest.mark.parametrize("name", SPEC_SHEETS)
def test_every_sheet_has_a_source_and_sane_figures(name: str) -> None:
    sheet = SPEC_SHEETS[name]
    assert len(sheet.source) > 20
    assert 1e11 < sheet.mem_bandwidth < 1e13
    assert 1e10 < sheet.memory < 1e12
    peaks = sheet.peak_flops
    assert peaks["float32"] == min(peaks.values())
    if {"float16", "bfloat16"} <= peaks.keys():
        assert peaks["float16"] == peaks["bfloat16"]
    if "float8" in peaks:  # half the width, twice as many
        assert peaks["float8"] == pytest.approx(2 * peaks["float16"], rel=0.02)
    if "tf32" in peaks:
        assert peaks["float32"] <= peaks["tf32"] <= 0.51 * peaks["float16"]


def test_a_name_that_is_nearly_right_is_guessed() -> None:
    with pytest.raises(ValueError, match=r"f\(name='h10-sxm'\).*Did you mean 'h100-sxm'"):
        spec_sheet("f", "h10-sxm")
    with pytest.raises(
        ValueError, match=r"must be one of 'a100-sxm-80gb'.*MachineBalance\.measure"
    ):
        spec_sheet("f", "abacus")


@pytest.mark.parametrize("sparse", [1979e12, 1978.9e12, 2000e12])
def test_a_peak_of_sparse_matrices_is_refused(sparse: float) -> None:
    with pytest.raises(ValueError, match=r"peak of h100-sxm for sparse.*989|is 9\.894e\+14"):
        check_dense("f", "h100-sxm", "bfloat16", sparse)


def test_a_peak_that_is_merely_high_is_not() -> None:
    check_dense("f", "h100-sxm", "bfloat16", 1100e12)
    check_dense("f", "v100-sxm2", "float16", 250e12)  # it has no sparse products


def test_lightnings_table_agrees_where_it_is_dense() -> None:
    """Theirs has sparse figures for H200, which would halve a utilisation."""
    from lightning.fabric.utilities.throughput import _CUDA_FLOPS as THEIRS

    pairs = [("h100 sxm", "h100-sxm"), ("h100 pcie", "h100-pcie"), ("a100", "a100-sxm-80gb")]
    for theirs, ours in pairs:
        for dtype, peak in THEIRS[theirs].items():
            name = str(dtype).removeprefix("torch.").replace("tfloat32", "tf32")
            known = SPEC_SHEETS[ours].peak_flops.get(name)
            assert known is None or known == pytest.approx(peak, rel=0.01)
