"""Messages between ranks in an analysis: bytes that are sent, and that memory sees."""

from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed import _functional_collectives as functional

from lightning_align.planner import analyze_step
from lightning_align.planner.op_flops import MESSAGE
from tests.helpers.ranks import run_ranks

X = 4 * 60  # bytes


def in_place_sum(x: Any) -> None:
    distributed.all_reduce(x)


def gather(x: Any) -> None:
    distributed.all_gather_into_tensor(x.new_empty(180), x)


def scatter(x: Any) -> None:
    distributed.reduce_scatter_tensor(x.new_empty(20), x)


def listed(x: Any) -> None:
    distributed.all_gather([torch.empty_like(x) for _ in range(3)], x)


def pair(x: Any) -> None:
    """In a group of two."""
    group = distributed.new_group([0, 1])
    if distributed.get_rank() < 2:
        distributed.all_reduce(x, group=group)


def functional_sum(x: Any) -> None:
    functional.all_reduce(x, "sum", distributed.group.WORLD).sum()


def handed_on(x: Any) -> None:
    if distributed.get_rank() == 0:
        distributed.send(x, 1)
    elif distributed.get_rank() == 1:
        distributed.recv(x, 0)


def nothing(x: Any) -> None:
    distributed.barrier()


@pytest.mark.parametrize(
    ("talk", "sent", "moved"),
    [
        (in_place_sum, 2 * X * 2 // 3, 2 * X),
        (gather, 3 * X * 2 // 3, 4 * X),
        (scatter, X * 2 // 3, X + X // 3),
        (listed, 3 * X * 2 // 3, 4 * X),
        (pair, 2 * X // 2, 2 * X),
        (functional_sum, 2 * X * 2 // 3, 2 * X),
        (handed_on, X, X),
        (nothing, 0, None),
    ],
)
def test_a_ring_sends_what_the_formula_says(talk: Any, sent: int, moved: int | None) -> None:
    """(n - 1) / n of the whole from each of three ranks, for a sum that all keep twice that."""

    def on_a_rank(rank: int) -> tuple[int, int, dict[str, int]]:
        model = nn.Linear(1, 1)
        x = torch.ones(60)
        with torch.no_grad():
            report = analyze_step(model, lambda: talk(x))
        messages = [record for record in report.trace.records if record.kind == MESSAGE]
        return report.sent_bytes, sum(each.bytes for each in messages), report.uncounted

    found = run_ranks(on_a_rank, world_size=3)
    assert found[0][0] == sent
    assert found[0][2] == {}
    if moved is not None:
        assert found[0][1] == moved
