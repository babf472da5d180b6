"""What ``memory_limit`` buys."""

import lightning.pytorch as pl
import pytest
from torch import nn

from lightning_align.strategies.zero_infinity.blocks import find_blocks
from lightning_align.strategies.zero_infinity.budget import Buffers, held_nbytes, parse_bytes, plan
from lightning_align.strategies.zero_infinity.strategy import ZeROInfinityStrategy
from tests.helpers.covers import cover
from tests.helpers.offloaded import ADAMW, Regression, compare, fit, points

GROUPS = Buffers(sub_group_size=512)


def test_sizes_are_read_in_any_unit():
    sizes = [4096, "4096", "4GB", "1.5 MiB", "2kb"]
    assert [parse_bytes(size) for size in sizes] == [4096, 4096, 4 * 10**9, 3 << 19, 2000]


def test_a_limit_below_the_largest_block_names_the_least_possible():
    blocks, _ = find_blocks(Regression(), None)
    with pytest.raises(ValueError, match=r"must be at least [0-9,]+ bytes") as error:
        plan(blocks, "10KB", GROUPS)
    least = int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    assert plan(blocks, least, GROUPS).blocks == 2
    with pytest.raises(ValueError, match="must be at least"):
        plan(blocks, least - 1, GROUPS)
    richer = plan(blocks, least + 10**6, GROUPS)
    assert richer.gradients
    assert all(block.kept and block.gradients_stay for block in blocks)


def test_a_held_state_takes_each_block_once_more_where_it_lies(tmp_path):
    strategy = ZeROInfinityStrategy(sub_group_size=400)
    trainer = fit(tmp_path, Regression(), points(), strategy)
    engine = trainer.strategy._engine
    folders = engine.store.folders
    found = held_nbytes(engine.blocks, folders, 1)
    numel = sum(p.numel() for p in Regression().parameters())
    assert found.keys() == {"", str(folders[0])}
    assert found[""] == 0
    # Parameters and two moments; blocks begin at pages.
    least = 12 * numel
    assert least <= found[str(folders[0])] <= least + 4096 * len(engine.blocks)
    assert strategy.state_nbytes() == found
    for block in engine.blocks:
        block.is_stored, block.states_stay = False, True
    assert held_nbytes(engine.blocks, folders, 1) == {"": found[str(folders[0])]}
    trainer.strategy.close()


class Wide(Regression):
    """Blocks that are far larger than what stays."""

    def __init__(self):
        super().__init__(ADAMW)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(20, 4096), nn.Tanh(), nn.Linear(4096, 20)) for _ in range(8)
        )


@cover(clip=[None, 0.5], extra=[0, 2_000_000, 10_000_000])
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
    data = points()
    fit(tmp_path, Wide(), data, strategy, callbacks=[Held()], gradient_clip_val=clip)
    assert max(held) <= least + extra
    assert sum(block.nbytes for block in blocks) * 4 > least  # parameters, gradients and moments


def least_of(module, buffers, **options):
    blocks, _ = find_blocks(module, None)
    with pytest.raises(ValueError, match="must be at least") as error:
        plan(blocks, 1, buffers, **options)
    return int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))


@cover(
    options={"plain": {}, "clipped": {"gradient_clip_val": 0.05}},
    extra={"gradients on disk": 20_000, "in memory": 10**7},
)
def test_blocks_that_fit_stay_and_train_as_in_memory(tmp_path, extra, options):
    limit = least_of(Regression(), GROUPS) + extra
    blocks, _ = find_blocks(Regression(), None)
    plan(blocks, limit, GROUPS)
    assert all(block.kept for block in blocks)
    assert all(block.gradients_stay for block in blocks) == (extra == 10**7)
    strategy = ZeROInfinityStrategy(memory_limit=limit, sub_group_size=512)
    data = points()
    compare(tmp_path, Regression, data, strategy, **options)


def test_a_higher_limit_keeps_more_blocks_spread_over_the_order():
    buffers = Buffers(sub_group_size=20_000)
    least, found = least_of(Wide(), buffers), []
    for more in range(13):
        blocks, _ = find_blocks(Wide(), None)
        memory = plan(blocks, least + more * 700_000, buffers)
        moving = [block for block in blocks if block.name != "rest"]
        found.append((memory.gradients, [block.kept for block in moving]))
    counts = [sum(kept) for gradients, kept in found if not gradients]
    assert counts == sorted(counts)
    assert 0 < counts[3] < counts[-1] == 8
    assert found[0][1] == [False] * 8
    some = next(kept for _, kept in found if sum(kept) == 2)
    assert some not in ([True] * 2 + [False] * 6, [False] * 6 + [True] * 2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_has_two_sections_that_are_updated_beside_whole_blocks(ranks):
    largest = max(block.nbytes for block in find_blocks(Wide(), None)[0])
    more = least_of(Wide(), GROUPS, ranks=ranks) - least_of(Wide(), GROUPS)
    assert more == 2 * largest // ranks


def test_groups_become_smaller_before_a_limit_is_refused():
    """Of the usual size of a group, unless sub_group_size says otherwise."""
    blocks, _ = find_blocks(Regression(), None)
    limit = least_of(Regression(), Buffers())
    assert limit < 10**6
    memory = plan(blocks, limit, Buffers())
    assert memory.group_bytes < 10**4
    with pytest.raises(ValueError, match="must be at least"):
        plan(blocks, limit, Buffers(sub_group_size=8 << 20))
    assert plan(blocks, "auto", Buffers(optimizer=4)).groups == 4
