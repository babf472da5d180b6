"""Matrices in parts: what ranks compute of their rows is what one computes of all."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_align.optimizers import projection, sharded_matrices
from lightning_align.optimizers.projection import Basis
from tests.helpers.ranks import run_ranks

ROWS, COLS, RANK = 7, 5, 2  # rows that two ranks do not share evenly


def drawn() -> tuple[Tensor, Tensor, Basis, Basis]:
    generator = torch.Generator().manual_seed(0)
    weight, gradient, left, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((ROWS, COLS), (ROWS, COLS), (ROWS, RANK), (COLS, RANK))
    )
    return weight, gradient, Basis(left, None), Basis(None, right)


def parts(tensor: Tensor | None, placement: Any = None) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    return None if tensor is None else distribute_tensor(tensor, mesh, [placement or Shard(0)])


@pytest.mark.parametrize("side", ["left", "right"])
def test_projected_updates_are_those_of_whole_matrices(side: str) -> None:
    weight, gradient, left, right = drawn()
    basis = left if side == "left" else right
    coordinates = projection.project(gradient, basis)
    expected = weight.clone()
    projection.add_projected_back_(expected, coordinates, basis, beta=0.9, alpha=-0.1)

    def on_a_rank(rank: int) -> tuple[Tensor, Tensor, int]:
        own = sharded_matrices.for_own_rows(Basis(parts(basis.left), parts(basis.right)))
        ours, update = parts(weight), sharded_matrices.project(parts(gradient), own)
        sharded_matrices.add_projected_back_(ours, update, own, beta=0.9, alpha=-0.1)
        return update.full_tensor(), ours.full_tensor(), len(update.to_local())

    held = 0
    for found, updated, rows in run_ranks(on_a_rank):
        torch.testing.assert_close(found, coordinates)
        torch.testing.assert_close(updated, expected)
        held += rows
    assert held == len(coordinates), "each row is on one rank"


def test_values_lie_as_a_weight_does() -> None:
    weight = drawn()[0]

    def on_a_rank(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        ours = parts(weight)
        of_rank_zero = sharded_matrices.lying_as(ours, weight + rank)
        own = sharded_matrices.own_rows(ours, weight + rank)
        zeros = sharded_matrices.zeros_lying_as(ours, torch.Size([3, RANK]), torch.float32)
        assert isinstance(zeros, DTensor)
        assert all(each.placements == ours.placements for each in (of_rank_zero, own, zeros))
        return tuple(sharded_matrices.whole(each) for each in (of_rank_zero, own, zeros))  # type: ignore[return-value]

    for of_rank_zero, own, zeros in run_ranks(on_a_rank):
        assert torch.equal(of_rank_zero, weight)
        first = (ROWS + 1) // 2
        assert torch.equal(own, torch.cat([weight[:first], weight[first:] + 1]))
        assert torch.equal(zeros, torch.zeros(3, RANK))


def test_plain_tensors_pass_through() -> None:
    weight, gradient, _, right = drawn()
    assert sharded_matrices.whole(weight) is weight
    assert sharded_matrices.whole(None) is None
    assert sharded_matrices.lying_as(weight, gradient) is gradient
    assert sharded_matrices.own_rows(weight, gradient) is gradient
    assert torch.equal(
        sharded_matrices.project(gradient, right), projection.project(gradient, right)
    )


def test_divided_rows_are_told_from_whole_ones() -> None:
    weight = drawn()[0]

    def on_a_rank(rank: int) -> list[bool]:
        placed = [weight, *(parts(weight, each) for each in (Shard(0), Shard(1), Replicate()))]
        return [sharded_matrices.has_whole_rows(each) for each in placed]

    assert run_ranks(on_a_rank) == [[True, True, False, True]] * 2
