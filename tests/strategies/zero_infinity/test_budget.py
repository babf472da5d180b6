"""What ``memory_limit`` buys."""

import pytest

from lightning_align.strategies.zero_infinity.blocks import find_blocks
from lightning_align.strategies.zero_infinity.budget import parse_bytes, plan
from tests.helpers.offloaded import ADAMW, Regression


def test_sizes_are_read_in_any_unit():
    sizes = [4096, "4096", "4GB", "1.5 MiB", "2kb"]
    assert [parse_bytes(size) for size in sizes] == [4096, 4096, 4 * 10**9, 3 << 19, 2000]


def test_a_limit_below_the_largest_block_names_the_least_possible():
    blocks, _ = find_blocks(Regression(ADAMW), None)
    with pytest.raises(ValueError, match=r"must be at least [0-9,]+ bytes") as error:
        plan(blocks, "10KB", None, 4096)
    least = int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    assert plan(blocks, least, None, 4096).blocks == 2
    with pytest.raises(ValueError, match="must be at least"):
        plan(blocks, least - 1, None, 4096)
    richer = plan(blocks, least + 10**6, None, 4096)
    assert richer.gradients
    assert richer.blocks == 4
