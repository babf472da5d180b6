"""Matrices of which each rank has some rows (FSDP2); others pass through as they are.

What needs all of one gathers it once and goes on with a plain tensor, as Muon does: a product of
DTensors sends something each time. All that GaLore keeps for such a matrix is divided as it is,
along the first dimension, so that N ranks hold 1 / N of basis and moments each. A rank gathers what
its rows of the update need:

========  =====================================  ==========================================
basis     the projected gradient R               the update
========  =====================================  ==========================================
right V   rows of G V: V is gathered             rows of R' V^T, from rows of R'
left P    P^T G, a sum over the ranks, of which  rows of P R', from rows of P: R' is gathered
          each keeps rows
========  =====================================  ==========================================

R' is Adam's direction for R. Where a basis is sought, the gradient of one matrix is gathered, every
rank seeks it, and rank 0's is taken: rows of two that differ in a sign would be of no subspace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightning_align.optimizers import projection
from lightning_align.optimizers.projection import Basis


def has_whole_rows(parameter: Tensor) -> bool:
    """Whether no row of it is divided among ranks."""
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    divided = [placement for placement in placements if placement != Replicate()]
    return divided in ([], [Shard(0)])


def whole(tensor: Any) -> Any:
    """A tensor, or None, with the parts of all ranks; collective where it is a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def lying_as(weight: Tensor, value: Tensor) -> Tensor:
    """Rank 0's tensor ``value`` divided as a weight is; collective where that is a DTensor."""
    if not isinstance(weight, DTensor):
        return value
    return distribute_tensor(value.contiguous(), weight.device_mesh, weight.placements)


def own_rows(weight: Tensor, value: Tensor) -> Tensor:
    """A tensor that every rank has made alike, divided as a weight is; nothing is sent."""
    if not isinstance(weight, DTensor):
        return value
    mesh, placements = weight.device_mesh, weight.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def zeros_lying_as(weight: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros of a shape, divided as a weight is."""
    if not isinstance(weight, DTensor):
        return torch.zeros(shape, dtype=dtype, device=weight.device)
    layout: Any = {"device_mesh": weight.device_mesh, "placements": weight.placements}
    return torch.distributed.tensor.zeros(shape, dtype=dtype, **layout)


def for_own_rows(basis: Basis) -> Basis:
    """Of a basis in parts: its rows for the rows of this rank, and all of the other side."""
    left: Any = basis.left
    return Basis(left.to_local() if isinstance(left, DTensor) else left, whole(basis.right))


def project(gradient: Tensor, basis: Basis) -> Tensor:
    """The gradient in the coordinates of a basis ``for_own_rows``, divided as it is."""
    if not isinstance(gradient, DTensor):
        return projection.project(gradient, basis)
    mesh, placements = gradient.device_mesh, gradient.placements
    own = projection.project(gradient.to_local(), basis)
    if basis.left is not None:
        sums = [Partial() if placement == Shard(0) else placement for placement in placements]
        # Contiguous: torch sends what is behind a view's strides.
        return DTensor.from_local(own.contiguous(), mesh, sums).redistribute(mesh, placements)
    shape = torch.Size([gradient.shape[0], own.shape[1]])
    stride = (own.shape[1], 1)
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=stride)


def add_projected_back_(
    weight: Tensor, projected: Tensor, basis: Basis, *, beta: float, alpha: float
) -> None:
    """``weight <- beta * weight + alpha * project_back(projected)``, each rank its rows.

    The basis is one ``for_own_rows``.
    """
    if isinstance(weight, DTensor) and isinstance(projected, DTensor):
        projected = projected.to_local() if basis.left is None else projected.full_tensor()
        weight = weight.to_local()
    projection.add_projected_back_(weight, projected, basis, beta=beta, alpha=alpha)
