"""Bytes and seconds of a step: by hand, by the paper's table, and as an engine counts them."""

import pytest
import torch
from torch import nn

from lightning_align.offload.bandwidth import (
    BACKWARD,
    FORWARD,
    UPDATE,
    Bandwidth,
    BlockBytes,
    Moved,
    StepLayout,
    activation_intensity,
    bandwidth_for,
    efficiency,
    fresh_memory_s,
    hiding_tokens,
    optimizer_intensity,
    parameter_intensity,
    step_bytes,
    step_s,
    total,
    transfer_s,
)
from tests.offload.test_engine import network, offloaded, train

MANY = 1000  # blocks: of which the few that stay from phase to phase do not count


def adamw(count=MANY, gradients=4, **options):
    """Blocks of one parameter in fp32 each, with two moments."""
    return StepLayout([BlockBytes(4, 8, gradients)] * count, resident=2, **options)


@pytest.mark.parametrize(
    ("options", "nbytes"),
    [
        ({}, 28),  # forward 4, backward 4, moments read 8, all written 12
        ({"gradients_wait": True}, 40),  # and 4 + 4 of gradients, 4 of the parameter once more
        ({"gradients_wait": True, "gradients": 0}, 32),
        ({"gradients_wait": True, "updates_wait": True}, 36),  # with the next forward
        ({"batches": 2}, 28 + 16),  # 8 read, gradients written and read
        ({"batches": 3, "gradients_wait": True}, 40 + 2 * 16),
    ],
)
def test_what_a_parameter_costs(options, nbytes):
    moved = total(step_bytes(adamw(**options)))
    assert (moved.read + moved.written) / MANY == pytest.approx(nbytes, rel=0.01)


def test_phases_of_four_blocks_of_which_two_are_in_memory():
    """Forward 0 1 2 3 leaves 2 and 3; backward 3 2 1 0 fetches 1 and 0 and leaves those.

    An update from 0 on fetches 2 and 3; the next forward finds them, but not when it comes to
    them: 0 and 1 have taken their room.
    """
    early = step_bytes(adamw(4))
    assert early == [(FORWARD, Moved(8)), (BACKWARD, Moved(8 + 32, 32 + 16))]
    late = step_bytes(adamw(4, gradients_wait=True))
    assert late == [
        (FORWARD, Moved(16)),
        (BACKWARD, Moved(8, 16)),
        (UPDATE, Moved(8 + 16 + 32, 32 + 16)),
    ]
    later = step_bytes(adamw(4, gradients_wait=True, updates_wait=True))
    assert later == [
        (FORWARD, Moved(8 + 16 + 32, 32 + 16)),
        (BACKWARD, Moved(8, 16)),
        (UPDATE, Moved()),
    ]


def test_frozen_blocks_are_read_only_where_gradients_pass_through():
    """The first has nothing before it that trains, the third has."""
    kinds = [False, True, False, True]
    blocks = [BlockBytes(4, 8, 4, trains=trains) for trains in kinds]
    phases = dict(step_bytes(StepLayout(blocks, resident=2)))
    # Backward 3 2 1: two are there; it leaves 1 and 2, of which the next forward finds 1.
    assert phases == {FORWARD: Moved(12), BACKWARD: Moved(4 + 16, 16 + 8)}


def test_what_stays_in_memory_is_written_once_a_step():
    layout = StepLayout([BlockBytes(4, 8, 0, stays=True), *adamw(4).blocks], resident=2)
    with_it, without = total(step_bytes(layout)), total(step_bytes(adamw(4)))
    assert with_it == without.plus(Moved(8, 12))


def test_values_in_memory_alone_are_exchanged_and_neither_read_nor_written():
    blocks = [BlockBytes(4, 8, 4, is_stored=False)] * 4
    moved = total(step_bytes(StepLayout(blocks, resident=2, ranks=2)))
    assert moved == Moved(32 / 2, 32 / 2, (8 + 8 + 16) / 2)


def test_activations_go_and_come_with_each_batch():
    without, with_them = (
        total(step_bytes(adamw(4, batches=2, activation_bytes=n))) for n in (0, 7)
    )
    assert with_them == without.plus(Moved(14, 14))


def test_ranks_share_the_drive_and_exchange_the_rest():
    """Each fetch brings 3/4 from others; so does each reduced gradient."""
    one, four = (total(step_bytes(adamw(4, ranks=ranks))) for ranks in (1, 4))
    assert four == Moved(one.read / 4, one.written / 4, (8 + 8 + 16) * 3 / 4)
    assert one.exchanged == 0


def test_a_step_takes_what_its_phases_take():
    """Forward: 2 s of arithmetic hide 1 s; backward: 8 s of transfers hide 4 s."""
    phases = [(FORWARD, Moved(10)), (BACKWARD, Moved(40, 20))]
    bandwidth, compute = Bandwidth(read=10, write=5), {FORWARD: 2.0, BACKWARD: 4.0}
    assert transfer_s(Moved(40, 20), bandwidth) == 8
    assert transfer_s(Moved(40, 20, 100), Bandwidth(10, 5, exchange=10)) == 10
    assert step_s(phases, compute, bandwidth) == 2 + 8
    assert step_s(phases, compute, bandwidth, overlap=0.0) == (2 + 1) + (8 + 4)


def test_fresh_memory_is_that_of_gradients_of_blocks_that_come_and_go():
    kinds = [{}, {"trains": False}, {"stays": True}, {}]
    layout = StepLayout([BlockBytes(10, 20, 10, **kind) for kind in kinds])
    assert fresh_memory_s(layout, 4.0) == 5


def test_tokens_that_hide_the_drive():
    """28 bytes at 2 bytes a second take 14 s; a token takes 6 operations of 3 a second, 2 s."""
    bandwidth = Bandwidth(2, 2)
    assert hiding_tokens(adamw(), MANY, bandwidth, 3) == pytest.approx(7, rel=0.01)
    # Clipped, 16 of the 40 are moved while something computes.
    clipped = hiding_tokens(adamw(gradients_wait=True), MANY, bandwidth, 3)
    assert clipped == pytest.approx(3, rel=0.01)


def test_efficiency_is_that_of_the_paper():
    """arXiv:2104.07857, section 4.2: 70 TFLOP/s a GPU, sequences of 1024.

    With one sequence, parameters and gradients need about 70 GB/s for an efficiency of one half,
    with two about half of it. Optimizer states need four times as much.
    """
    peak, tokens = 70e12, 1024
    needed = bandwidth_for(0.5, parameter_intensity(tokens), peak)
    assert needed == pytest.approx(70e9, rel=0.03)
    assert bandwidth_for(0.5, parameter_intensity(2 * tokens), peak) == needed / 2
    assert bandwidth_for(0.5, optimizer_intensity(tokens), peak) == 4 * needed
    assert efficiency(parameter_intensity(tokens), needed, peak) == pytest.approx(0.5)
    assert activation_intensity(8192, 2) == 24 * 8192 * 2


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("count", [2, 3])
def test_an_engine_moves_what_is_predicted(tmp_path, count, early, window):
    module = network()
    engine = offloaded(tmp_path, module, count, group_bytes=1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    engine.optimize_with(optimizer, fresh=True)
    train(module, optimizer, engine, early, steps=3, window=window)
    traffic, before = engine.threads.traffic, (0, 0)
    before = traffic.read, traffic.written
    train(module, optimizer, engine, early, steps=2, window=window)
    engine.store.settle_all()
    states = [
        sum(place.capacity for place in engine.store.states[block.name].values())
        for block in engine.blocks
    ]
    blocks = [
        BlockBytes(b.nbytes, size, b.nbytes) for b, size in zip(engine.blocks, states, strict=True)
    ]
    layout = StepLayout(blocks, count, window, gradients_wait=not early, updates_wait=not early)
    expected = total(step_bytes(layout))
    assert traffic.read - before[0] == 2 * expected.read
    assert traffic.written - before[1] == 2 * expected.written
    engine.close()


def test_blocks_of_a_module_that_was_not_cut_cost_nothing_but_their_update():
    kept = BlockBytes(nn.Linear(3, 3).weight.nbytes, 72, 0, stays=True)
    assert total(step_bytes(StepLayout([kept]))) == Moved(72, 72 + 36)
