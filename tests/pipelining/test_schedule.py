"""Schedules against the figures of their papers and against torch's runtime."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from lightning_align.pipelining import SCHEDULES, build_schedule, simulate
from tests.helpers.timeline import diagram


def test_gpipe_is_all_forwards_then_all_backwards() -> None:
    assert diagram(simulate("GPipe", 4, 4)) == [
        "F0 F1 F2 F3 .. .. .. .. .. .. .. .. .. B0 -- B1 -- B2 -- B3 --",
        ".. F0 F1 F2 F3 .. .. .. .. .. .. B0 -- B1 -- B2 -- B3 --",
        ".. .. F0 F1 F2 F3 .. .. .. B0 -- B1 -- B2 -- B3 --",
        ".. .. .. F0 F1 F2 F3 B0 -- B1 -- B2 -- B3 --",
    ]


def test_1f1b_is_figure_4_of_megatron() -> None:
    """arXiv:2104.04473, Figure 4, above; their microbatches count from 1."""
    assert diagram(simulate("1F1B", 4, 8)) == [
        "F0 F1 F2 F3 .. .. .. .. .. .. B0 -- F4 B1 -- F5 B2 -- F6 B3 -- F7 B4 -- .. B5 -- .. B6 -- "
        ".. B7 --",
        ".. F0 F1 F2 .. .. .. .. B0 -- F3 B1 -- F4 B2 -- F5 B3 -- F6 B4 -- F7 B5 -- .. B6 -- "
        ".. B7 --",
        ".. .. F0 F1 .. .. B0 -- F2 B1 -- F3 B2 -- F4 B3 -- F5 B4 -- F6 B5 -- F7 B6 -- .. B7 --",
        ".. .. .. F0 B0 -- F1 B1 -- F2 B2 -- F3 B3 -- F4 B4 -- F5 B5 -- F6 B6 -- F7 B7 --",
    ]


def test_interleaved_1f1b_takes_a_round_of_microbatches_through_each_stage_of_a_rank() -> None:
    """Stages 0 and 2 are on rank 0: F0 F1 for stage 0, F0 F1 for stage 2, then F2 F3 and so on."""
    result = simulate("Interleaved1F1B", 2, 4, 2)
    assert diagram(result) == [
        "F0 F1 F0 F1 F2 .. B0 -- F3 B1 -- F2 B0 -- F3 B1 -- .. B2 -- .. B3 -- B2 -- B3 --",
        ".. F0 F1 F0 B0 -- F1 B1 -- F2 B0 -- F3 B1 -- F2 B2 -- F3 B3 -- B2 -- B3 --",
    ]
    first = [str(action) for action in result.schedule.actions(0)]
    assert first[:8] == ["0F0", "0F1", "2F0", "2F1", "0F2", "2B0", "0F3", "2B1"]


def test_breadth_first_takes_all_microbatches_through_each_stage_of_a_rank() -> None:
    assert diagram(simulate("LoopedBFS", 2, 3, 2)) == [
        "F0 F1 F2 F0 F1 F2 .. .. .. B2 -- B1 -- B0 -- B2 -- B1 -- B0 --",
        ".. F0 F1 F2 F0 F1 F2 B2 -- B1 -- B0 -- B2 -- B1 -- B0 --",
    ]


def test_zero_bubble_h1_is_figure_3_of_its_paper() -> None:
    """arXiv:2401.10241, Figure 3, above: backwards for the weights fill what 1F1B waits."""
    assert diagram(simulate("InterleavedZeroBubble", 4, 8, 1)) == [
        "F0 F1 F2 F3 .. .. .. I0 W0 F4 I1 W1 F5 I2 W2 F6 I3 W3 F7 I4 W4 I5 W5 I6 W6 I7 W7",
        ".. F0 F1 F2 .. .. I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 F6 I4 W3 F7 I5 W4 I6 W5 I7 W6 W7",
        ".. .. F0 F1 .. I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 F6 I5 W3 F7 I6 W4 I7 W5 W6 W7",
        ".. .. .. F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 F6 I6 W3 F7 I7 W4 W5 W6 W7",
    ]


@pytest.mark.parametrize(
    ("name", "pp", "m", "v"),
    [
        ("GPipe", 4, 3, 1),
        ("LoopedBFS", 3, 5, 3),
        ("Interleaved1F1B", 2, 4, 2),
        ("Interleaved1F1B", 4, 10, 3),
        ("Interleaved1F1B", 4, 3, 2),
        ("InterleavedZeroBubble", 4, 8, 3),
        ("ZBVZeroBubble", 4, 3, 2),
    ],
)
def test_ours_is_the_order_that_torch_makes(name: str, pp: int, m: int, v: int) -> None:
    """Not for 1F1B: torch 2.13 answers with rows that lack actions, and runs the right ones."""
    theirs = get_schedule_ops(name, pp, m, v)
    ours = build_schedule(name, pp, m, v)
    for rank in range(pp):
        expected = [str(action) for action in theirs[rank] if action and action.is_compute_op]
        assert [str(action) for action in ours.actions(rank)] == expected


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    pp=st.integers(1, 6),
    rounds=st.integers(1, 4),
    v=st.integers(2, 3),
)
def test_each_forward_runs_once_and_before_its_backward(
    name: str, pp: int, rounds: int, v: int
) -> None:
    v = {"GPipe": 1, "1F1B": 1, "ZBVZeroBubble": 2, "DualPipeV": 2}.get(name, v)
    m = 2 * pp * rounds
    schedule = build_schedule(name, pp, m, v)
    done: Counter[str] = Counter()
    for rank in range(pp):
        for stage, kind, microbatch in schedule.actions(rank):
            if kind in "BI":
                assert done[f"{stage}F{microbatch}"] == 1
            if kind == "W":
                assert done[f"{stage}I{microbatch}"] == 1
            done[f"{stage}{kind}{microbatch}"] += 1
    assert set(done.values()) == {1}
    assert sum(count for action, count in done.items() if "F" in action) == pp * v * m
    assert sum(count for action, count in done.items() if "B" in action or "I" in action) == (
        pp * v * m
    )
    simulate(schedule)  # and no rank waits for ever


def test_names_are_read_in_any_case_and_stages_have_a_default() -> None:
    assert build_schedule("gpipe", 2, 2).name == "GPipe"
    assert build_schedule("interleaved1f1b", 2, 2).num_stages == 4


def test_stages_go_round_the_ranks_or_up_and_down_a_v() -> None:
    assert build_schedule("Interleaved1F1B", 3, 3).stage_ranks.tolist() == [0, 1, 2, 0, 1, 2]
    assert build_schedule("ZBVZeroBubble", 3, 6).stage_ranks.tolist() == [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1b_interleaved", 2, 4), r"build_schedule\(schedule='1f1b_.*one of GPipe, 1F1B, Inter"),
        (("1F1B", 0, 4), r"\(pp=0\): must be an integer of at least 1"),
        (("1F1B", 2, float("nan")), r"\(num_microbatches=nan\): must be an integer of at least 1"),
        (("1F1B", 2, True), r"\(num_microbatches=True\): must be an integer of at least 1"),
        (("1F1B", 2.0, 4), r"\(pp=2.0\): must be an integer of at least 1"),
        (("1F1B", "2", 4), r"\(pp='2'\): must be an integer of at least 1"),
        (("1F1B", 2, 0), r"\(num_microbatches=0\): must be an integer of at least 1"),
        (
            ("1F1B", 2, 4, 2),
            r"\(num_stages_per_rank=2\): 1F1B has one stage .* Use Interleaved1F1B",
        ),
        (("GPipe", 2, 4, 2), r"Use LoopedBFS"),
        (("Interleaved1F1B", 2, 4, 1), r"two stages or more on each rank. Use 1F1B"),
        (("ZBVZeroBubble", 2, 4, 3), r"\(num_stages_per_rank=3\): ZBVZeroBubble has two stages"),
        (("DualPipeV", 4, 7), r"\(num_microbatches=7\): DualPipeV needs as many .* as stages, 8"),
        (("Interleaved1F1B", 4, 9), r"\(num_microbatches=9\): .* 2 rounds .*. Use 8 or 12"),
    ],
)
def test_numbers_that_a_schedule_cannot_have_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_schedule(*arguments)
