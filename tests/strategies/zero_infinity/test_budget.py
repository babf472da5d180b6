"""What ``memory_limit`` buys."""

import lightning.pytorch as pl
import pytest
from torch import nn
from torch.utils.data import DataLoader

from lightning_align.strategies.zero_infinity.blocks import find_blocks
from lightning_align.strategies.zero_infinity.budget import Buffers, parse_bytes, plan
from lightning_align.strategies.zero_infinity.strategy import ZeROInfinityStrategy
from tests.helpers.offloaded import ADAMW, Regression, fit, points

GROUPS = Buffers(sub_group_size=512)


def test_sizes_are_read_in_any_unit():
    sizes = [4096, "4096", "4GB", "1.5 MiB", "2kb"]
    assert [parse_bytes(size) for size in sizes] == [4096, 4096, 4 * 10**9, 3 << 19, 2000]


def test_a_limit_below_the_largest_block_names_the_least_possible():
    blocks, _ = find_blocks(Regression(ADAMW), None)
    with pytest.raises(ValueError, match=r"must be at least [0-9,]+ bytes") as error:
        plan(blocks, "10KB", GROUPS)
    least = int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    assert plan(blocks, least, GROUPS).blocks == 2
    with pytest.raises(ValueError, match="must be at least"):
        plan(blocks, least - 1, GROUPS)
    richer = plan(blocks, least + 10**6, GROUPS)
    assert richer.gradients
    assert all(block.kept and block.gradients_stay for block in blocks)


class Wide(Regression):
    """Blocks that are far larger than what stays."""

    def __init__(self):
        super().__init__(ADAMW)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(20, 4096), nn.Tanh(), nn.Linear(4096, 20)) for _ in range(8)
        )


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("extra", [0, 2_000_000, 10_000_000])
def test_what_is_held_keeps_to_the_limit(tmp_path, clip, extra):
    blocks, _ = find_blocks(Wide(), None)
    with pytest.raises(ValueError, match="must be at least") as error:
        plan(blocks, 1, Buffers(sub_group_size=20_000))
    least = int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    held = []

    class Held(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            held.append(trainer.strategy._engine.pool.allocated_bytes)

    strategy = ZeROInfinityStrategy(memory_limit=least + extra, sub_group_size=20_000)
    data = DataLoader(points(), batch_size=8)
    fit(tmp_path, Wide(), data, strategy, callbacks=[Held()], gradient_clip_val=clip)
    assert max(held) <= least + extra
    assert sum(block.nbytes for block in blocks) * 4 > least  # parameters, gradients and moments
