"""The polynomial that Muon applies to singular values, two ways.

Newton-Schulz takes M = U S V^T to U p(S) V^T, with p an odd polynomial that lifts every singular
value to about 1. It does not converge to U V^T: with Jordan's coefficients p(s) ends anywhere in
[0.7, 1.2], which costs nothing in training (https://kellerjordan.github.io/posts/muon/).

- ``newton_schulz`` iterates on the matrix: five times three products. The arithmetic of
  torch.optim.Muon, in the dtype you say (torch: always bf16, some 500 times slower on a CPU).
- ``eigh`` finds the eigenvalues of the small Gram matrix M M^T, applies the very same polynomial
  to those numbers, and multiplies back: three products and one decomposition. On a CPU that is
  about half the time; on a GPU the decomposition is slow.

Shapes: (..., R, C) rows and columns, N the smaller of the two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_align._errors import argument_error

Backend = Literal["auto", "newton_schulz", "eigh"]
Dtype = Literal["auto", "float32", "bfloat16"]
Coefficients = tuple[float, float, float]

JORDAN: Coefficients = (3.4445, -4.7750, 2.0315)  # https://kellerjordan.github.io/posts/muon/
# arXiv:2505.16932, Algorithm 1's list for singular values above 1e-3: the best polynomial for each
# step, given the steps before it. From the eighth step on it stays the same.
_POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01  # ibid.: rounding may lift a singular value above 1, where the polynomials explode

# torch.linalg re-exports it without saying so to type checkers.
_NoConvergence: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

# On one thread of a CPU, eigh is the faster one from about this many elements on, whatever the
# ratio of rows to columns: 1.1x at 192 x 192, 1.5x at 512 x 512, 2.6x at 512 x 1376.
_EIGH_PAYS = 2**15


def schedule(coefficients: Any, steps: int, where: str = "orthogonalize") -> list[Coefficients]:
    """The coefficients (a, b, c) of each step; one triple serves all of them.

    Args:
        coefficients: Three numbers, a sequence of such triples whose last one repeats, or
            "polar_express".
        steps: Number of steps, 1 to 99.
        where: Whom an error names.

    Raises:
        ValueError: If they are something else.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps < 100:
        raise argument_error(where, "ns_steps", steps, "must be a whole number from 1 to 99")
    if coefficients == "polar_express":
        *first, last = _POLAR_EXPRESS
        rows = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in first] + [last]
    elif _is_triple(coefficients):
        rows = [tuple(coefficients)]
    elif (
        isinstance(coefficients, (list, tuple))
        and coefficients
        and all(map(_is_triple, coefficients))
    ):
        rows = [tuple(row) for row in coefficients]
    else:
        rule = "must be three numbers, a list of such triples, or 'polar_express'"
        raise argument_error(where, "ns_coefficients", coefficients, rule)
    return [rows[min(step, len(rows) - 1)] for step in range(steps)]


def _is_triple(value: Any) -> bool:
    is_sequence = isinstance(value, (list, tuple)) and len(value) == 3
    return is_sequence and all(isinstance(number, (int, float)) for number in value)


def check_bounded(coefficients: Any, steps: int, where: str) -> None:
    """Refuse a schedule that takes a singular value somewhere else than near 1.

    Raises:
        ValueError: If it makes more than 100 of one in [0, 1], or is no schedule.
    """
    values = [number / 64 for number in range(65)]
    for a, b, c in schedule(coefficients, steps, where):
        values = [s * (a + s * s * (b + s * s * c)) for s in values]
    for value in values:
        if not abs(value) <= 100:  # NaN, too
            rule = f"must keep singular values near 1, and make {value:g} of one"
            raise argument_error(where, "ns_coefficients", coefficients, rule)


def choose_backend(rows: int, columns: int, device: torch.device) -> Backend:
    """What ``backend="auto"`` takes for a matrix of this size on this device."""
    pays = device.type == "cpu" and rows * columns >= _EIGH_PAYS
    return "eigh" if pays else "newton_schulz"


def choose_dtype(dtype: Dtype, matrices: Tensor) -> torch.dtype:
    """What ``ns_dtype`` means for these matrices: "auto" is bf16 on a GPU, never on a CPU."""
    if dtype == "auto":
        if matrices.device.type != "cpu":
            return torch.bfloat16
        return torch.promote_types(matrices.dtype, torch.float32)
    return torch.float32 if dtype == "float32" else torch.bfloat16


def orthogonalize(
    matrices_RC: Tensor,
    *,
    coefficients: Coefficients | Sequence[Coefficients] | str = JORDAN,
    steps: int = 5,
    eps: float = 1e-7,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
) -> Tensor:
    """Bring the singular values of each matrix near 1.

    Args:
        matrices_RC: One matrix or a batch, (..., R, C).
        coefficients: Of the polynomial; see ``schedule``.
        steps: How often the polynomial is applied.
        eps: Least norm that a matrix is divided by.
        backend: "newton_schulz", "eigh", or "auto": what is faster for that size and device.
        dtype: Of the iterations of newton_schulz; eigh computes in fp32.

    Returns:
        A tensor of the shape and dtype of ``matrices_RC``.
    """
    if backend == "auto":
        num_rows, num_columns = matrices_RC.shape[-2:]
        backend = choose_backend(num_rows, num_columns, matrices_RC.device)
    rows = schedule(coefficients, steps)
    norm_factor = _SAFETY if coefficients == "polar_express" else 1.0
    if backend == "eigh":
        return eigh(matrices_RC, rows, eps, norm_factor)
    return newton_schulz(matrices_RC, rows, eps, choose_dtype(dtype, matrices_RC), norm_factor)


def newton_schulz(
    matrices_RC: Tensor,
    coefficients: Sequence[Coefficients],
    eps: float,
    dtype: torch.dtype,
    norm_factor: float = 1.0,
) -> Tensor:
    """X <- a X + (b G + c G^2) X with G = X X^T, once for each triple (a, b, c)."""
    x_NM, is_tall = _normalised(matrices_RC.to(dtype), eps, norm_factor)
    for a, b, c in coefficients:
        gram_NN = x_NM @ x_NM.mT
        update_NN = _add_product(gram_NN, gram_NN, gram_NN, beta=b, alpha=c)
        x_NM = _add_product(x_NM, update_NN, x_NM, beta=a, alpha=1.0)
    return (x_NM.mT if is_tall else x_NM).to(matrices_RC.dtype)


def eigh(
    matrices_RC: Tensor, coefficients: Sequence[Coefficients], eps: float, norm_factor: float = 1.0
) -> Tensor:
    """The same polynomial, applied to the eigenvalues of G = X X^T = Q diag(l) Q^T.

    Every iterate is Q diag(f) Q^T X: a step multiplies f by a + b l + c l^2 and the singular
    values, the roots of l, as well. If LAPACK does not converge in fp32, in fp64; if not there
    either, ``newton_schulz`` does it.
    """
    wide = torch.promote_types(matrices_RC.dtype, torch.float32)
    x_NM, is_tall = _normalised(matrices_RC.to(wide), eps, norm_factor)
    gram_NN = x_NM @ x_NM.mT
    try:
        values_N, vectors_NN = _decompose(gram_NN)
    except _NoConvergence:
        _warn_of_newton_schulz()
        return newton_schulz(matrices_RC, coefficients, eps, wide, norm_factor)
    # Below that an eigenvalue is rounding, perhaps negative. One that is 0 would stay 0 while its
    # f grows threefold in each step, and 20 steps of a matrix of low rank would explode.
    values_N = values_N.clamp(min=torch.finfo(wide).eps / 4)
    factors_N = torch.ones_like(values_N)
    for a, b, c in coefficients:
        factor_N = a + b * values_N + c * values_N.square()
        factors_N = factors_N * factor_N
        values_N = values_N * factor_N.square()
    x_NM = (vectors_NN * factors_N.unsqueeze(-2)) @ vectors_NN.mT @ x_NM
    return (x_NM.mT if is_tall else x_NM).to(matrices_RC.dtype)


def _decompose(gram_NN: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return _finite(*_eigh(gram_NN))
    except _NoConvergence:
        values_N, vectors_NN = _finite(*_eigh(gram_NN.double()))
        return values_N.to(gram_NN.dtype), vectors_NN.to(gram_NN.dtype)


def _finite(values_N: Tensor, vectors_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Both; LAPACK may give nan without a word where entries are of very different sizes."""
    if not (values_N.isfinite().all() and vectors_NN.isfinite().all()):
        raise _NoConvergence("not finite")
    return values_N, vectors_NN


_eigh: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.linalg.eigh


@cache
def _warn_of_newton_schulz() -> None:
    warnings.warn(
        "An eigenvalue decomposition did not converge, not in fp64 either. newton_schulz took its "
        "place; this is said once.",
        stacklevel=2,
    )


def _normalised(matrices_RC: Tensor, eps: float, factor: float) -> tuple[Tensor, bool]:
    """Wide matrices of Frobenius norm at most 1, in a new tensor, and whether they were tall."""
    norms = torch.linalg.vector_norm(matrices_RC, dim=(-2, -1), keepdim=True)
    normalised_RC = matrices_RC / (norms * factor).clamp(min=eps)
    is_tall = matrices_RC.shape[-2] > matrices_RC.shape[-1]
    return (normalised_RC.mT if is_tall else normalised_RC), is_tall


def _add_product(
    added: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float
) -> Tensor:
    """``beta * added + alpha * left @ right`` in one kernel."""
    if added.ndim == 2:
        return torch.addmm(added, left, right, beta=beta, alpha=alpha)
    return torch.baddbmm(added, left, right, beta=beta, alpha=alpha)
