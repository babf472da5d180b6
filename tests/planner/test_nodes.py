"""Nodes belong to sheets."""

from lightning_align.planner.nodes import NODES
from lightning_align.planner.spec_sheets import SPEC_SHEETS


def test_every_device_has_a_node_with_its_source() -> None:
    assert set(NODES) == set(SPEC_SHEETS)
    for node in NODES.values():
        assert node.source
        assert node.nvme_read_bandwidth >= node.nvme_write_bandwidth > 0
        assert node.devices >= 1
