"""The simulator against formulas, published rates and schedules whose times are known."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_align.pipelining import Schedule, build_schedule, simulate


@pytest.mark.parametrize(("pp", "m"), [(1, 1), (2, 2), (4, 8), (8, 32), (16, 16), (64, 128)])
def test_the_bubble_is_that_of_the_formulas(pp: int, m: int) -> None:
    """(p - 1) / m, and (p - 1) / (m v) interleaved (arXiv:2104.04473, Sections 2.2.1 and 2.2.2)."""
    for name in ("GPipe", "1F1B"):
        assert simulate(name, pp, m).bubble_over_ideal == pytest.approx((pp - 1) / m, abs=1e-6)
    for v in (2, 4):
        result = simulate("Interleaved1F1B", pp, m, v)
        assert result.bubble_over_ideal == pytest.approx((pp - 1) / (m * v), abs=1e-6)


@pytest.mark.parametrize(("pp", "m"), [(4, 8), (8, 32), (16, 64)])
def test_zero_bubble_schedules_have_their_published_rates(pp: int, m: int) -> None:
    """With T_F = T_B = T_W, against 1F1B's bubble: ZB-H1 a third (arXiv:2401.10241, Section 2.1),
    its interleaved form that over v, ZB-V none if each rank's own step counts (arXiv:2405.15362).
    """
    costs = {"forward_cost": 1.0, "backward_cost": 2.0, "weight_cost": 1.0}
    of_1f1b = simulate("1F1B", pp, m, **costs).bubble_over_ideal
    zb_h1 = simulate("InterleavedZeroBubble", pp, m, 1, **costs)
    assert zb_h1.bubble_over_ideal == pytest.approx(of_1f1b / 3, rel=1e-6)
    interleaved = simulate("InterleavedZeroBubble", pp, m, 2, **costs)
    assert interleaved.bubble_over_ideal == pytest.approx(of_1f1b / 6, rel=1e-6)
    zb_v = simulate("ZBVZeroBubble", pp, m, **costs)
    assert zb_v.own_bubble_over_ideal == pytest.approx(0, abs=1e-6)
    assert zb_v.bubble_over_ideal == pytest.approx(of_1f1b / 6, rel=1e-6), "the ranks start late"


def test_each_rank_remembers_what_its_schedule_lets_it() -> None:
    """Rank r of p = 4, m = 8: GPipe all m, 1F1B p - r, interleaved more on fewer layers each:
    p (1 + (p - 1) / (p v)) on rank 0 (arXiv:2205.05198)."""
    assert simulate("GPipe", 4, 8).peak_activations == [8, 8, 8, 8]
    assert simulate("1F1B", 4, 8).peak_activations == [4, 3, 2, 1]
    assert simulate("1F1B", 4, 64).peak_activations == [4, 3, 2, 1]
    assert simulate("Interleaved1F1B", 4, 8, 2).peak_activations == [5.5, 4.5, 3.5, 2.5]
    assert simulate("ZBVZeroBubble", 4, 8).peak_activations == [4, 4, 4, 4]
    assert simulate("DualPipeV", 4, 8).peak_activations == [4.5, 4.5, 4.5, 4.5]


def test_peak_bytes_count_what_each_stage_keeps() -> None:
    """Rank 0 of GPipe with m = 3 keeps 3 x 5 and rank 1 keeps 3 x 7 bytes."""
    assert simulate("GPipe", 2, 3, saved_bytes=[5, 7]).peak_saved_bytes == [15, 21]
    assert simulate("GPipe", 2, 3).peak_saved_bytes is None


def test_the_slowest_stage_sets_the_pace() -> None:
    """Stage 1 of 3 takes 2 + 4, the others 1 + 2; m = 5: its microbatches take 30.

    Before them is a forward of stage 0 (1), after them a backward of stage 0 (2). It waits once:
    its second forward is from 3 to 5, and stage 2's first backward from 4 to 6 (1). 34 in all.
    """
    result = simulate("1F1B", 3, 5, forward_cost=[1, 2, 1], backward_cost=[2, 4, 2])
    assert result.busy == [15, 30, 15]
    assert result.step_time == 34
    assert result.bubble_over_ideal == pytest.approx(4 / 30)


def test_messages_take_latency_and_size_over_bandwidth_and_none_within_a_rank() -> None:
    """One microbatch crosses 3 boundaries forwards and 3 backwards, each 0.5 + 8 / 4 = 2.5."""
    message = {"comm_latency": 0.5, "bandwidth": 4.0, "activation_bytes": 8.0}
    assert simulate("GPipe", 4, 1, **message).step_time == 4 * 3 + 6 * 2.5
    # ZB-V: stages 0 1 | 2 3 go 0 1 1 0: two of the three boundaries are between ranks.
    v = build_schedule("ZBVZeroBubble", 2, 1)
    assert simulate(v, **message).step_time == simulate(v).step_time + 4 * 2.5
    sizes = {**message, "activation_bytes": [8.0, 4.0, 0.0, 99.0]}
    assert simulate("GPipe", 4, 1, **sizes).step_time == 12 + 2 * (2.5 + 1.5 + 0.5)


def test_the_weights_gradient_is_half_of_the_backward_unless_told() -> None:
    events = simulate("ZBVZeroBubble", 2, 4, backward_cost=3.0).events
    assert {e.end_s - e.start_s for e in events if e.action in "IW"} == {1.5}
    events = simulate("ZBVZeroBubble", 2, 4, backward_cost=3.0, weight_cost=1.0).events
    assert {(e.action, round(e.end_s - e.start_s, 9)) for e in events} == {
        ("F", 1),
        ("I", 2),
        ("W", 1),
    }


@given(
    name=st.sampled_from(["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "ZBVZeroBubble"]),
    pp=st.integers(1, 5),
    rounds=st.integers(1, 3),
    data=st.data(),
)
def test_every_event_waits_for_its_rank_and_for_its_message(
    name: str, pp: int, rounds: int, data: st.DataObject
) -> None:
    schedule = build_schedule(name, pp, pp * rounds)
    stages = schedule.num_stages
    times = st.lists(st.floats(0.1, 9), min_size=stages, max_size=stages)
    result = simulate(
        schedule,
        forward_cost=data.draw(times),
        backward_cost=data.draw(times),
        comm_latency=(latency := data.draw(st.floats(0, 3))),
    )
    ran = {
        (e.stage_index, e.action.replace("I", "B"), e.microbatch_index): e for e in result.events
    }
    last_of_rank = dict.fromkeys(range(pp), 0.0)
    for event in result.events:
        stage, microbatch = event.stage_index, event.microbatch_index
        earliest = last_of_rank[event.rank]
        other = ran.get(
            (stage - 1, "F", microbatch) if event.action == "F" else (stage + 1, "B", microbatch)
        )
        if event.action != "W" and other is not None:
            earliest = max(earliest, other.end_s + (latency if other.rank != event.rank else 0.0))
        assert event.start_s == pytest.approx(earliest)
        last_of_rank[event.rank] = event.end_s
    assert result.step_time == max(event.end_s for event in result.events)


def test_a_million_actions_take_seconds() -> None:
    """The aim is 4 s of CPU time on the machines of benchmarks/RESULTS.md; here a quarter of it."""
    before = time.process_time()
    result = simulate("1F1B", 512, 256)
    assert len(result.ends) == 2 * 512 * 256
    assert time.process_time() - before < 4
    assert result.bubble_over_ideal == pytest.approx(511 / 256, abs=1e-6)
    assert "events" not in vars(result), "built only when asked for"


@pytest.mark.slow
def test_thousands_of_ranks() -> None:
    result = simulate("1F1B", 2048, 512)
    assert result.bubble_over_ideal == pytest.approx(2047 / 512, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pp": None}, r"simulate\(pp=None\): must be given with a schedule's name"),
        ({"num_microbatches": None}, r"\(num_microbatches=None\): must be given"),
        ({"schedule": "2F2B"}, r"simulate\(schedule='2F2B'\): must be one of"),
        ({"forward_cost": [1.0]}, r"\(forward_cost=\[1.0\]\): .* or one for each of the 2 stages"),
        ({"backward_cost": -1.0}, r"\(backward_cost=-1.0\): must be finite and not negative"),
        ({"backward_cost": float("inf")}, "must be finite"),
        ({"forward_cost": 1e308}, r"\(forward_cost=1e\+308\): must be finite .* at most 1e\+100"),
        ({"forward_cost": 10**400}, r"\(forward_cost=10+\): must be finite"),
        ({"comm_latency": 10**400}, r"\(comm_latency=10+\): must be finite"),
        ({"activation_bytes": 1.0, "bandwidth": 5e-324}, r"5e-324\): a message would take more th"),
        ({"forward_cost": 0, "backward_cost": 0}, r"\(forward_cost=0\): some stage must take time"),
        ({"weight_cost": 3.0}, r"\(weight_cost=3.0\): is a part of backward_cost"),
        ({"comm_latency": -1.0}, r"\(comm_latency=-1.0\): must be finite and not negative"),
        ({"bandwidth": 1.0}, r"\(bandwidth=1.0\): counts only together with activation_bytes"),
        ({"activation_bytes": 1.0}, r"\(activation_bytes=1.0\): .* together with bandwidth"),
        ({"activation_bytes": 1.0, "bandwidth": 0.0}, r"\(bandwidth=0.0\): must be positive"),
        ({"saved_bytes": [1.0]}, r"\(saved_bytes=\[1.0\]\): must be one number, or one for each"),
    ],
)
def test_bad_input_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(**{"schedule": "1F1B", "pp": 2, "num_microbatches": 4, **arguments})


def test_a_built_schedule_takes_no_other_numbers() -> None:
    with pytest.raises(ValueError, match=r"simulate\(schedule='1F1B'\): has its own numbers"):
        simulate(build_schedule("1F1B", 2, 4), num_microbatches=8)


def test_a_schedule_that_lacks_an_action_cannot_be_made() -> None:
    rows = build_schedule("1F1B", 2, 4).rows
    with pytest.raises(ValueError, match=r"Schedule\(rows='mine'\): no rank runs 1B3, or 1I3 and"):
        Schedule("mine", 2, 4, [rows[0], np.delete(rows[1], -1, axis=0)])
