"""Low-rank projections of a gradient (GaLore, arXiv:2403.03507), and five ways to a subspace.

galore-torch takes a full SVD of every gradient at every refresh, which costs some twenty ordinary
steps. Only the span of the leading singular vectors matters, and it moves slowly: one product with
the gradient's Gram matrix, started from the old basis, finds nearly all of it for a fraction of
the price ("subspace", the default). Each way is a function from a gradient to orthonormal columns.

Shapes: gradient (rows, cols); a basis of the left side (rows, rank), of the right side
(cols, rank), columns orthonormal; "full" has both. ``columns`` below is the gradient seen from one
side, (side, other): the gradient itself from the left, its transpose from the right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_align._errors import check_choice

Side = Literal["left", "right"]
COLD_ITERATIONS = 3  # from a random start: 0.998 of the best energy on the spectrum k^-0.7
OVERSAMPLING = 10  # extra random directions, Halko et al., arXiv:0909.4061, section 4.3


class Basis(NamedTuple):
    """The subspace of one matrix: orthonormal columns on one side, or on both ("full").

    Attributes:
        left: (rows, rank), or None.
        right: (cols, rank), or None.
    """

    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def rank(self) -> int:
        """Columns of a side; 0 if there is none yet."""
        return next((side.shape[1] for side in self if side is not None), 0)


def sides(proj_type: str, rows: int, cols: int) -> tuple[Side, ...]:
    """Which sides of a (rows, cols) gradient are projected, with galore-torch's meaning.

    Raises:
        ValueError: If ``proj_type`` has no meaning.
    """
    shorter: Side = "right" if rows >= cols else "left"
    longer: Side = "left" if rows >= cols else "right"
    chosen: dict[str, tuple[Side, ...]] = {
        "std": (shorter,),
        "reverse_std": (longer,),
        "left": ("left",),
        "right": ("right",),
        "full": ("left", "right"),
    }
    check_choice("GaLoreAdamW", "proj_type", proj_type, chosen)
    return chosen[proj_type]


def projected_shape(basis_sides: tuple[Side, ...], shape: torch.Size, rank: int) -> torch.Size:
    """Shape of the projected gradient, which is that of both moments."""
    rows, cols = shape
    lengths = rank if "left" in basis_sides else rows, rank if "right" in basis_sides else cols
    return torch.Size(lengths)


def project(gradient: Tensor, basis: Basis) -> Tensor:
    """The gradient in the coordinates of the basis."""
    if basis.left is not None:
        gradient = basis.left.T @ gradient
    if basis.right is not None:
        gradient = gradient @ basis.right
    return gradient


def project_back(projected: Tensor, basis: Basis) -> Tensor:
    """The (rows, cols) matrix that has these coordinates."""
    if basis.left is not None:
        projected = basis.left @ projected
    if basis.right is not None:
        projected = projected @ basis.right.T
    return projected


def add_projected_back_(
    weight: Tensor, projected: Tensor, basis: Basis, *, beta: float, alpha: float
) -> None:
    """``weight <- beta * weight + alpha * project_back(projected)``, without a full-size tensor.

    A weight in half precision is the exception: the sum is rounded once, so it is formed apart.
    """
    if weight.dtype != projected.dtype:
        update = project_back(projected, basis).mul_(alpha)
        weight.copy_(update.add_(weight, alpha=beta))
    elif basis.right is None:
        assert basis.left is not None
        weight.addmm_(basis.left, projected, beta=beta, alpha=alpha)
    else:
        rows = projected if basis.left is None else basis.left @ projected
        weight.addmm_(rows, basis.right.T, beta=beta, alpha=alpha)


def captured_energy(gradient: Tensor, basis: Basis) -> float:
    """Share of the squared Frobenius norm of the gradient that the projection keeps."""
    kept = torch.linalg.vector_norm(project(gradient, basis), dtype=torch.float64)
    return float((kept / torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2)


# One way each: (gradient, side, rank, old basis or None, generator) -> (side, rank), orthonormal.
Refresh = Callable[[Tensor, Side, int, Tensor | None, torch.Generator], Tensor]


def _columns(gradient: Tensor, side: Side) -> Tensor:
    return gradient if side == "left" else gradient.T


def svd(
    gradient: Tensor, side: Side, rank: int, old: Tensor | None, generator: torch.Generator
) -> Tensor:
    """The leading singular vectors, from the very call that galore-torch makes.

    The moments are not rotated at a refresh, so the trajectory depends on the signs that LAPACK
    happens to choose: the SVD of the transpose has others.
    """
    del old, generator
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    vectors: Tensor = left[:, :rank] if side == "left" else right[:rank].T
    return vectors


def eigh(
    gradient: Tensor, side: Side, rank: int, old: Tensor | None, generator: torch.Generator
) -> Tensor:
    """The leading eigenvectors of the smaller Gram matrix: the same span as the SVD."""
    del old, generator
    columns = _columns(gradient, side)
    vectors: Tensor
    if columns.shape[0] <= columns.shape[1]:
        vectors = torch.linalg.eigh(columns @ columns.T).eigenvectors  # in ascending order
        return vectors[:, -rank:].flip(1)
    vectors = torch.linalg.eigh(columns.T @ columns).eigenvectors[:, -rank:].flip(1)
    return _orthonormal(columns @ vectors)


def randomized(
    gradient: Tensor, side: Side, rank: int, old: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Randomized SVD with one power iteration (Halko et al., arXiv:0909.4061, algorithm 4.4)."""
    del old
    columns = _columns(gradient, side)
    width = min(rank + OVERSAMPLING, *columns.shape)
    wide = columns @ _gaussian(columns.shape[1], width, columns, generator)
    wide = _orthonormal(columns @ (columns.T @ _orthonormal(wide)))
    small = wide.T @ columns  # (width, other)
    vectors: Tensor = torch.linalg.eigh(small @ small.T).eigenvectors[:, -rank:].flip(1)
    return wide @ vectors


def subspace(
    gradient: Tensor, side: Side, rank: int, old: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Subspace iteration from the old basis: one product with the Gram matrix, then QR.

    Successive gradients share most of their leading subspace, so one iteration keeps up with it;
    a cold start takes ``COLD_ITERATIONS``. A column keeps its direction as well as the QR lets it,
    so the moments, which are not rotated, stay about right.
    """
    columns = _columns(gradient, side)
    iterations = 1
    if old is None or old.shape[1] < rank:
        start = _gaussian(columns.shape[0], rank, columns, generator)
        if old is not None:
            start[:, : old.shape[1]] = old
        old, iterations = _orthonormal(start), COLD_ITERATIONS
    basis = old[:, :rank]
    for _ in range(iterations):
        basis = _orthonormal(columns @ (columns.T @ basis))
    return basis


def random(
    gradient: Tensor, side: Side, rank: int, old: Tensor | None, generator: torch.Generator
) -> Tensor:
    """A random subspace: the price of nothing, and about rank / side of the energy."""
    del old
    columns = _columns(gradient, side)
    return _orthonormal(_gaussian(columns.shape[0], rank, columns, generator))


REFRESHES: dict[str, Refresh] = {
    "subspace": subspace,
    "eigh": eigh,
    "randomized": randomized,
    "svd": svd,
    "random": random,
}


def refreshed(
    projection: str,
    gradient: Tensor,
    basis_sides: tuple[Side, ...],
    rank: int,
    old: Basis,
    seed: int,
) -> tuple[Basis, bool]:
    """A new basis for this gradient, and whether the decomposition succeeded.

    Args:
        projection: A name in ``REFRESHES``.
        gradient: (rows, cols), finite, in single or double precision.
        basis_sides: From ``sides``.
        rank: Columns of the new basis, at most min(rows, cols).
        old: The basis so far; empty at the first call.
        seed: Of what is drawn; the same one draws the same.

    Returns:
        The new basis and True; for a gradient of zeros, which has no subspace, the old one and
        True. Where LAPACK gives up, in double precision too, the old basis (a random one if there
        is none) and False.
    """
    lowest, highest = torch.aminmax(gradient)  # torch's infinity norm is twenty times slower
    largest = max(-float(lowest), float(highest))
    if largest == 0:
        return old, True
    if not 1e-9 < largest < 1e9:
        # Gram matrices square: bring it to about 1, by a power of two, which rounds nothing.
        gradient = gradient * 2.0 ** -max(math.frexp(largest)[1], -126)
    for dtype in (gradient.dtype, torch.float64):
        generator = torch.Generator().manual_seed(seed)
        try:
            found = {
                side: REFRESHES[projection](
                    gradient.to(dtype), side, rank, _cast(getattr(old, side), dtype), generator
                )
                for side in basis_sides
            }
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if all(bool(basis.isfinite().all()) for basis in found.values()):
            return _as_basis(found, gradient.dtype), True
    if old.rank:
        return old, False
    generator = torch.Generator().manual_seed(seed)
    drawn = {side: random(gradient, side, rank, None, generator) for side in basis_sides}
    return _as_basis(drawn, gradient.dtype), False


def _cast(basis: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if basis is None else basis.to(dtype)


def _as_basis(found: dict[Side, Tensor], dtype: torch.dtype) -> Basis:
    """Copies: a view in the optimizer's state would keep the whole factor of an SVD alive."""
    layout = {"memory_format": torch.contiguous_format}
    return Basis(**{side: basis.to(dtype).clone(**layout) for side, basis in found.items()})


def _gaussian(rows: int, cols: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Drawn on the CPU, so that every device gets the same numbers."""
    return torch.randn(rows, cols, generator=generator, dtype=like.dtype).to(like.device)


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the span, each vector on the side of the column it came from."""
    vectors: Tensor
    vectors, triangle = torch.linalg.qr(columns)
    return vectors * torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(vectors.dtype)
