import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align.optimizers import orthogonalize as module
from lightning_align.optimizers.orthogonalize import (
    JORDAN,
    choose_backend,
    choose_dtype,
    eigh,
    newton_schulz,
    orthogonalize,
    schedule,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = [(24, 24), (40, 24), (24, 40), (1, 30), (30, 1), (3, 16, 24)]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def with_singular_values(values: list[float], rows: int, columns: int) -> Tensor:
    """A matrix in fp64 that has them."""
    n = len(values)
    left = torch.linalg.qr(normal(rows, n, dtype=torch.float64))[0]
    right = torch.linalg.qr(normal(columns, n, dtype=torch.float64))[0]
    return left * torch.tensor(values) @ right.T


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def torch_muon_in_fp32(gradient: Tensor, steps: int = 5) -> Tensor:
    """torch.optim.Muon's function, with its cast to bf16 taken out."""
    from torch.optim import _muon

    class StaysWide(torch.Tensor):
        def bfloat16(self) -> Tensor:  # type: ignore[override]
            return torch.Tensor(self).clone()

    wide: Any = gradient.clone().as_subclass(StaysWide)
    return torch.Tensor(_muon._zeropower_via_newtonschulz(wide, JORDAN, steps, 1e-7))


@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_newton_schulz_matches_torch_muon(shape: tuple[int, int]) -> None:
    gradient = normal(*shape)
    ours = newton_schulz(gradient, schedule(JORDAN, 5), 1e-7, torch.float32)
    # the norm is summed in another order
    torch.testing.assert_close(ours, torch_muon_in_fp32(gradient), rtol=1e-5, atol=1e-6)


def test_newton_schulz_in_bf16_matches_torch_muon_as_shipped() -> None:
    from torch.optim import _muon

    gradient = normal(16, 24)
    theirs = _muon._zeropower_via_newtonschulz(gradient, JORDAN, 5, 1e-7)
    ours = orthogonalize(gradient, backend="newton_schulz", dtype="bfloat16")
    assert ours.dtype == torch.float32
    assert relative(ours, theirs.float()) < 2e-2  # 8 bits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", [JORDAN, "polar_express"])
def test_eigh_matches_newton_schulz(shape: tuple[int, ...], coefficients: Any) -> None:
    gradient = normal(*shape, dtype=torch.float64)
    ours, theirs = (
        orthogonalize(gradient, coefficients=coefficients, backend=backend)
        for backend in ("eigh", "newton_schulz")
    )
    assert ours.shape == theirs.shape == shape
    # Rounding of 1e-16, lifted by p'(0): 3.4^5 = 485, and 9e2 for Polar Express; squared by Gram.
    assert relative(ours, theirs) < 1e-9


def test_eigh_in_fp32_on_a_spectrum_that_decays() -> None:
    """Rank 16 and noise a hundredth of it; bf16 is off by more than 1e-2 here."""
    low_rank = normal(64, 16) @ torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    gradient = low_rank + 0.01 * torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    exact = orthogonalize(gradient.double(), backend="newton_schulz")
    assert relative(orthogonalize(gradient, backend="eigh").double(), exact) < 1e-3
    assert relative(orthogonalize(gradient, backend="newton_schulz").double(), exact) < 1e-4


@pytest.mark.parametrize("backend", ["eigh", "newton_schulz"])
def test_singular_values_go_through_the_polynomial(backend: Any) -> None:
    """One step takes s to a s + b s^3 + c s^5, of s divided by the Frobenius norm.

    Singular values 3 and 4: norm 5, so 0.6 and 0.8 with a = 2, b = -1.5, c = 0.5 give
    1.2 - 0.324 + 0.03888 = 0.91488 and 1.6 - 0.768 + 0.16384 = 0.99584.
    """
    gradient = with_singular_values([3.0, 4.0], 2, 5)
    ours = orthogonalize(gradient, coefficients=(2.0, -1.5, 0.5), steps=1, backend=backend)
    found = torch.linalg.svdvals(ours)
    torch.testing.assert_close(found, torch.tensor([0.99584, 0.91488], dtype=torch.float64))
    # and the singular vectors stay: U S V^T with U p(S) V^T commutes
    torch.testing.assert_close(ours @ gradient.T, gradient @ ours.T)


def test_polar_express_is_nearer_to_one_than_jordan() -> None:
    """arXiv:2505.16932: after 8 steps singular values above 1e-3 of the norm are 1 within 1e-3."""
    gradient = with_singular_values([1.0, 0.3, 0.1, 0.03, 0.01, 3e-3], 20, 30)
    jordan, polar = (
        torch.linalg.svdvals(orthogonalize(gradient, coefficients=coefficients, steps=8))[:6]
        for coefficients in (JORDAN, "polar_express")
    )
    assert (polar - 1).abs().max() < 1e-2
    assert 0.1 < (jordan - 1).abs().max() < 0.4


@pytest.mark.parametrize("backend", ["eigh", "newton_schulz"])
def test_polar_express_keeps_clear_of_one(backend: Any) -> None:
    """A matrix of rank 1 has s = 1 after the norm, 1 / 1.01 with the margin of the paper's code.

    The first polynomial, of s / 1.01 as well, gives 8.287 x - 23.596 x^3 + 17.300 x^5 with
    x = 1 / 1.01^2 = 0.98030: 8.12394 - 22.22872 + 15.66222 = 1.5574.
    """
    gradient = with_singular_values([7.0], 4, 6)
    ours = orthogonalize(gradient, coefficients="polar_express", steps=1, backend=backend)
    assert torch.linalg.svdvals(ours)[0].item() == pytest.approx(1.5574, abs=1e-4)


@pytest.mark.parametrize("coefficients", [JORDAN, "polar_express"])
def test_many_steps_of_a_matrix_of_low_rank_stay_bounded(coefficients: Any) -> None:
    """An eigenvalue of 0 stays 0, while each step multiplies its factor by 3.4."""
    gradient = normal(40, 4) @ normal(4, 60)
    ours = orthogonalize(gradient, coefficients=coefficients, steps=40, backend="eigh")
    assert torch.linalg.matrix_norm(ours, 2).item() < 1.3


def test_a_batch_is_its_matrices() -> None:
    batch = normal(3, 8, 12)
    for backend in ("eigh", "newton_schulz"):
        ours = orthogonalize(batch, backend=backend)  # type: ignore[arg-type]
        each = torch.stack([orthogonalize(m, backend=backend) for m in batch])  # type: ignore[arg-type]
        torch.testing.assert_close(ours, each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eigh", "newton_schulz"])
def test_zero_stays_zero_and_the_input_stays_itself(backend: Any) -> None:
    zero = torch.zeros(6, 4)
    assert torch.equal(orthogonalize(zero, backend=backend), zero)
    gradient = normal(6, 4)
    before = gradient.clone()
    orthogonalize(gradient, backend=backend)
    assert torch.equal(gradient, before)


def test_auto_picks_by_device_and_size() -> None:
    assert choose_backend(512, 1376, CPU) == "eigh"
    assert choose_backend(1376, 512, CPU) == "eigh"
    assert choose_backend(64, 64, CPU) == "newton_schulz"
    assert choose_backend(512, 1376, CUDA) == "newton_schulz"
    large, small = normal(256, 256), normal(32, 32)
    for gradient, backend in ((large, "eigh"), (small, "newton_schulz")):
        ours = orthogonalize(gradient)
        assert torch.equal(ours, orthogonalize(gradient, backend=backend))  # type: ignore[arg-type]


def test_auto_dtype_is_never_bf16_on_a_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose_dtype("auto", torch.zeros(2, 2, dtype=dtype)) == torch.float32
    assert choose_dtype("auto", torch.zeros(2, 2, dtype=torch.float64)) == torch.float64
    on_gpu: Any = torch.zeros(2, 2, device="meta")  # stands for any device that is no CPU
    assert choose_dtype("auto", on_gpu) == torch.bfloat16
    assert choose_dtype("float32", on_gpu) == torch.float32


class Fails:
    """An eigh that does not converge: in any precision, or in fp32 only; perhaps without a word."""

    def __init__(self, in_fp64: bool, *, says_so: bool = True) -> None:
        self.in_fp64 = in_fp64
        self.says_so = says_so

    def __call__(self, gram: Tensor) -> Any:
        values, vectors = torch.linalg.eigh(gram)
        if self.in_fp64 or gram.dtype != torch.float64:
            if self.says_so:
                raise torch.linalg.LinAlgError("did not converge")
            vectors[0, 0] = torch.nan
        return values, vectors


@pytest.mark.parametrize("says_so", [True, False])
def test_eigh_that_fails_is_done_in_fp64(monkeypatch: pytest.MonkeyPatch, says_so: bool) -> None:
    gradient = normal(8, 12)
    expected = orthogonalize(gradient, backend="eigh")
    monkeypatch.setattr(module, "_eigh", Fails(in_fp64=False, says_so=says_so))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = orthogonalize(gradient, backend="eigh")
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_eigh_that_fails_in_fp64_too_is_done_by_newton_schulz(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gradient = normal(8, 12)
    expected = orthogonalize(gradient, backend="newton_schulz")
    monkeypatch.setattr(module, "_eigh", Fails(in_fp64=True))
    module._warn_of_newton_schulz.cache_clear()
    with pytest.warns(UserWarning, match="did not converge.*newton_schulz"):
        ours = orthogonalize(gradient, backend="eigh")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        orthogonalize(gradient, backend="eigh")  # once
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("value", [(1.0, 2.0), "jordan", [], [(1, 2, 3), (1, 2)], None, 3.0])
def test_schedule_refuses_other_coefficients(value: Any) -> None:
    with pytest.raises(ValueError, match=r"ns_coefficients=.*three numbers.*'polar_express'"):
        schedule(value, 5)


@pytest.mark.parametrize("steps", [0, 100, -1, 2.5])
def test_schedule_refuses_other_steps(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"ns_steps=.*whole number from 1 to 99"):
        schedule(JORDAN, steps)


def test_schedule_repeats_the_last_triple() -> None:
    assert schedule([(1, 2, 3), (4, 5, 6)], 3) == [(1, 2, 3), (4, 5, 6), (4, 5, 6)]
    polar = schedule("polar_express", 10)
    assert polar[7:] == [(1.875, -1.25, 0.375)] * 3
    assert math.isclose(polar[0][1], -23.595886519098837 / 1.01**3)
    assert eigh(normal(4, 6), polar, 1e-7).isfinite().all()
