"""Messages between devices, by hand."""

import pytest

from lightning_align.planner import HardwareSpec
from lightning_align.planner.collectives import Group, all_reduce_s, bandwidth
from lightning_align.planner.efficiencies import IDEAL, Efficiencies

HARDWARE = HardwareSpec(
    1e12, 1e12, 1e9, intra_bandwidth=100.0, inter_bandwidth=10.0, devices_per_node=8
)


def test_a_ring_moves_all_but_one_share_twice() -> None:
    assert all_reduce_s(400, Group(4), HARDWARE, IDEAL) == pytest.approx(2 * 3 / 4 * 4)
    assert all_reduce_s(400, Group(1), HARDWARE, IDEAL) == 0


def test_half_the_link_takes_twice_as_long_and_steps_cost_time() -> None:
    constants = Efficiencies(link=0.5, latency_s=1.0)
    assert all_reduce_s(400, Group(4), HARDWARE, constants) == pytest.approx(12 + 2 * 2)


@pytest.mark.parametrize(
    ("group", "rate"),
    [
        (Group(8), 100),
        (Group(2, stride=4), 100),
        (Group(16), 80),  # of eight adapters at 10 each
        (Group(64), 80),
        (Group(4, stride=4), 20),  # two ranks a node
        (Group(2, stride=8), 10),
    ],
)
def test_what_leaves_a_node_does_so_through_all_its_adapters(group: Group, rate: float) -> None:
    assert bandwidth(group, HARDWARE) == rate
