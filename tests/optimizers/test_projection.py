import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.optimizers import projection
from lightning_align.optimizers.projection import (
    REFRESHES,
    Basis,
    add_projected_back_,
    captured_energy,
    project,
    project_back,
    projected_shape,
    refreshed,
    sides,
)

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


def matrix_with_spectrum(singular_values, rows, cols, seed=0):
    """A (rows, cols) matrix with random singular vectors and these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(singular_values), generator=generator).double())[0]
        for size in (rows, cols)
    )
    return ((left * torch.as_tensor(singular_values).double()) @ right.T).float()


def basis_of(gradient, rank, method="eigh", proj_type="std", old=Basis(), seed=0):  # noqa: B008
    basis, succeeded = refreshed(
        method, gradient, sides(proj_type, *gradient.shape), rank, old, seed
    )
    assert succeeded
    return basis


def assert_orthonormal(basis):
    for side in basis:
        if side is not None:
            torch.testing.assert_close(side.T @ side, torch.eye(side.shape[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("proj_type", "tall", "square", "wide"),
    [
        ("std", ("right",), ("right",), ("left",)),
        ("reverse_std", ("left",), ("left",), ("right",)),
        ("left", ("left",), ("left",), ("left",)),
        ("right", ("right",), ("right",), ("right",)),
        ("full", ("left", "right"), ("left", "right"), ("left", "right")),
    ],
)
def test_sides_are_those_of_galore_torch(proj_type, tall, square, wide):
    assert (sides(proj_type, 6, 4), sides(proj_type, 4, 4), sides(proj_type, 4, 6)) == (
        tall,
        square,
        wide,
    )


def test_an_unknown_proj_type_is_answered_with_the_names():
    with pytest.raises(
        ValueError, match=r"proj_type='diag'\): must be one of 'std', 'reverse_std', .*'full'"
    ):
        sides("diag", 4, 4)


matrices = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**16)).map(
    lambda drawn: torch.randn(drawn[0], drawn[1], generator=torch.Generator().manual_seed(drawn[2]))
)


@settings(deadline=None, max_examples=40)
@given(matrices, st.integers(1, 12), st.sampled_from(PROJ_TYPES), st.sampled_from([*REFRESHES]))
def test_a_basis_is_orthonormal_and_projecting_twice_is_projecting_once(
    gradient, rank, proj_type, method
):
    rank = min(rank, *gradient.shape)
    old = Basis()
    for seed in range(2):  # cold, then warm
        old = basis_of(gradient, rank, method, proj_type, old, seed)
        assert_orthonormal(old)
        assert old.rank == rank
        projected = project(gradient, old)
        expected = projected_shape(sides(proj_type, *gradient.shape), gradient.shape, rank)
        assert projected.shape == expected
        again = project(project_back(projected, old), old)
        torch.testing.assert_close(again, projected, atol=1e-5, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(matrices, st.integers(1, 12), st.sampled_from(PROJ_TYPES), st.sampled_from(["svd", "eigh"]))
def test_svd_and_eigh_give_the_best_approximation_of_that_rank(gradient, rank, proj_type, method):
    """Eckart and Young: the least error of rank r is the sum of the squares of the other values."""
    rank = min(rank, *gradient.shape)
    basis = basis_of(gradient, rank, method, proj_type)
    error = (gradient - project_back(project(gradient, basis), basis)).square().sum()
    best = torch.linalg.svdvals(gradient)[rank:].square().sum()
    torch.testing.assert_close(error, best, atol=1e-4 * float(gradient.square().sum()), rtol=0)


def test_a_known_matrix_is_projected_on_its_largest_direction():
    """diag(3, 2) on the first axis: coordinates (3, 0), 9 of the 13 squares kept."""
    gradient = torch.diag(torch.tensor([3.0, 2.0]))
    for method in ("svd", "eigh", "randomized"):
        basis = basis_of(gradient, 1, method)
        assert basis.left is None
        assert basis.right.abs().flatten().tolist() == pytest.approx([1, 0], abs=1e-5)
        assert captured_energy(gradient, basis) == pytest.approx(9 / 13, abs=1e-5)


SPECTRUM = torch.arange(1, 97) ** -0.7


@pytest.mark.parametrize(("rows", "cols"), [(96, 160), (160, 96), (96, 96)])
@pytest.mark.parametrize(
    ("method", "share"), [("subspace", 0.99), ("randomized", 0.98), ("eigh", 0.9999)]
)
def test_a_cheap_basis_keeps_nearly_the_energy_of_the_best(rows, cols, method, share):
    gradient = matrix_with_spectrum(SPECTRUM, rows, cols)
    best = captured_energy(gradient, basis_of(gradient, 24, "svd"))
    cold = basis_of(gradient, 24, method)
    assert captured_energy(gradient, cold) >= share * best


def test_one_warm_iteration_keeps_up_with_a_gradient_that_drifts():
    """All singular vectors turn by acos 0.8 between refreshes; the old basis then keeps 0.7."""
    generator = torch.Generator().manual_seed(0)

    def turned(vectors):
        noise = torch.randn(vectors.shape, generator=generator) / math.sqrt(len(vectors))
        return torch.linalg.qr(0.8 * vectors + 0.6 * noise)[0]

    left, right = (
        torch.linalg.qr(torch.randn(size, 96, generator=generator))[0] for size in (96, 160)
    )
    basis = Basis()
    for number in range(6):
        gradient = (left * SPECTRUM) @ right.T
        best = captured_energy(gradient, basis_of(gradient, 24, "svd"))
        stale, basis = basis, basis_of(gradient, 24, "subspace", old=basis)
        assert captured_energy(gradient, basis) >= 0.99 * best
        if number > 0:
            assert captured_energy(gradient, stale) < 0.8 * best
        left, right = turned(left), turned(right)


def test_a_warm_refresh_of_the_same_gradient_keeps_every_column_on_its_side():
    """The moments are not rotated, so a column that came back as its opposite would undo them."""
    gradient = matrix_with_spectrum(torch.arange(8, 0, -1), 8, 12)
    cold = basis_of(gradient, 4, "subspace")
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    warm = basis_of(gradient, 4, "subspace", old=Basis(left=signs * cold.left))
    assert (signs * cold.left * warm.left).sum(0).min() > 0.9


def test_the_svd_is_the_call_of_galore_torch_and_holds_no_view():
    gradient = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    _, _, right = torch.linalg.svd(gradient, full_matrices=False)
    basis = basis_of(gradient, 3, "svd").right
    torch.testing.assert_close(basis, right[:3].T)  # signs and all
    for method in REFRESHES:
        basis = basis_of(gradient, 3, method).right
        assert basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
@pytest.mark.parametrize("method", REFRESHES)
def test_the_size_of_the_gradient_does_not_matter(method, magnitude):
    """Its square would underflow, or overflow, in single precision."""
    gradient = matrix_with_spectrum(SPECTRUM[:16], 16, 24)
    expected = captured_energy(gradient, basis_of(gradient, 4, method))
    basis = basis_of(gradient * magnitude, 4, method)
    assert captured_energy(gradient, basis) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["randomized", "subspace", "random"])
def test_draws_depend_on_the_seed_alone(method):
    gradient = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    first = basis_of(gradient, 3, method, seed=2).right
    torch.manual_seed(2)
    assert torch.equal(first, basis_of(gradient, 3, method, seed=2).right)
    assert not torch.equal(first, basis_of(gradient, 3, method, seed=3).right)


@pytest.mark.parametrize("method", REFRESHES)
def test_a_gradient_of_zeros_keeps_the_basis(method):
    old = basis_of(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), 2)
    zeros = torch.zeros(6, 4)
    assert refreshed(method, zeros, ("right",), 2, old, 0) == (old, True)
    assert refreshed(method, zeros, ("right",), 2, Basis(), 0) == (Basis(), True)


@pytest.mark.parametrize("method", REFRESHES)
def test_a_gradient_of_rank_one_still_gives_an_orthonormal_basis(method):
    gradient = torch.outer(torch.arange(1.0, 7), torch.arange(1.0, 9))
    basis = basis_of(gradient, 3, method)
    assert_orthonormal(basis)
    if method != "random":
        assert captured_energy(gradient, basis) == pytest.approx(1, abs=1e-5)


def failing(monkeypatch, *, in_double):
    """Let eigh fail as LAPACK does; returns the dtypes it was tried in."""
    tried = []

    def eigh(gradient, side, rank, old, generator):
        tried.append(gradient.dtype)
        if in_double or gradient.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return projection.svd(gradient, side, rank, old, generator)

    monkeypatch.setitem(REFRESHES, "eigh", eigh)
    return tried


def test_a_failed_decomposition_is_tried_in_double_precision(monkeypatch):
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    tried = failing(monkeypatch, in_double=False)
    basis = basis_of(gradient, 2)
    assert tried == [torch.float32, torch.float64]
    assert basis.right.dtype == torch.float32
    assert_orthonormal(basis)


def test_after_a_second_failure_the_old_basis_stays(monkeypatch):
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    old = basis_of(gradient, 2)
    failing(monkeypatch, in_double=True)
    assert refreshed("eigh", gradient, ("right",), 2, old, 0) == (old, False)
    drawn, succeeded = refreshed("eigh", gradient, ("right",), 2, Basis(), 0)
    assert not succeeded
    assert_orthonormal(drawn)


def test_a_basis_of_another_rank_is_cut_or_completed():
    gradient = matrix_with_spectrum(SPECTRUM[:16], 16, 24)
    old = basis_of(gradient, 4, "subspace")
    for rank in (2, 8):
        basis = basis_of(gradient, rank, "subspace", old=old)
        assert_orthonormal(basis)
        best = captured_energy(gradient, basis_of(gradient, rank, "svd"))
        assert captured_energy(gradient, basis) >= 0.95 * best


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_in_place_is_adding_the_matrix(proj_type, dtype):
    generator = torch.Generator().manual_seed(0)
    gradient, weight = (torch.randn(6, 4, generator=generator) for _ in range(2))
    weight = weight.to(dtype)
    basis = basis_of(gradient, 2, proj_type=proj_type)
    projected = project(gradient, basis)
    expected = 0.5 * weight.float() - 3 * project_back(projected, basis)
    add_projected_back_(weight, projected, basis, beta=0.5, alpha=-3)
    torch.testing.assert_close(weight, expected.to(dtype))


def test_energy_is_that_of_the_shadow():
    """(3, 4) seen on the second axis: 16 of 25."""
    basis = Basis(right=torch.tensor([[0.0], [1.0]]))
    energy = captured_energy(torch.tensor([[3.0, 4.0]]), basis)
    assert math.isclose(energy, 16 / 25, rel_tol=1e-6)
