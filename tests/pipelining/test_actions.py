"""Actions as text, and the rules of their order: each fault of a list of actions is named."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import _Action

from lightning_align.pipelining import SCHEDULES, build_schedule
from lightning_align.pipelining.actions import KINDS, Action, Rows, Schedule, find_fault


def rows(*ranks: str) -> list[Rows]:
    """Of a string of actions for each rank."""
    actions = [[Action.parse(text) for text in rank.split()] for rank in ranks]
    numbers = [
        [(a.stage_index, KINDS.index(a.kind), a.microbatch_index) for a in r if a] for r in actions
    ]
    return [np.array(rank, dtype=np.int64).reshape(-1, 3) for rank in numbers]


@given(st.builds(Action, st.integers(0, 10**9 - 1), st.sampled_from(KINDS), st.integers(0, 99)))
def test_an_action_returns_from_its_text_here_and_in_torch(action: Action) -> None:
    assert Action.parse(str(action)) == action
    theirs = _Action.from_str(str(action))
    assert theirs is not None
    assert (theirs.stage_index, theirs.microbatch_index) == (action[0], action[2])


@pytest.mark.parametrize(
    "text",
    ["", "F", "0F", "F0", "0f0", "0X0", "0SEND_F0", " 0F0", "0F0\n", "-1F0", "1" * 10 + "F0"],
)
def test_what_is_no_action_is_none(text: str) -> None:
    assert Action.parse(text) is None


def test_a_schedule_knows_its_ranks_stages_and_actions() -> None:
    schedule = Schedule("mine", 3, 1, rows("0F0 2F0 2B0 0I0 0W0", "1F0 1B0"))
    assert schedule.num_ranks == 2
    assert schedule.stage_ranks.tolist() == [0, 1, 0]
    assert [str(action) for action in schedule.actions(0)] == ["0F0", "2F0", "2B0", "0I0", "0W0"]
    assert schedule.actions(1) == [Action(1, "F", 0), Action(1, "B", 0)]


@pytest.mark.parametrize(
    ("ranks", "stages", "microbatches", "fault"),
    [
        (["0F0 0B0"], 1, 1, ""),
        (["0F0 0I0 0W0"], 1, 1, ""),
        (["0F0 0F1 0B1 0B0"], 1, 2, ""),
        (["0F0 0B0", ""], 1, 1, "rank 1 (row 2) has no actions"),
        (["0F0"], 2, 1, "1 actions are too few for 2 stages and 1 microbatches"),
        (["0F0 1F0 1B0"], 1, 1, "rank 0 (row 1), action 2 is 1F0, of 1 stages and 1 microbatches"),
        (["0F0 0B1"], 1, 1, "rank 0 (row 1), action 2 is 0B1, of 1 stages and 1 microbatches"),
        (["0F0", "0B0"], 1, 1, "rank 1 (row 2), action 1 is 0B0, and stage 0 is on rank 0"),
        (["0F0 0B0 0F0"], 1, 1, "rank 0 (row 1), action 1 is 0F0, and it comes again"),
        (["0B0"], 1, 1, "no rank runs 0F0"),
        (["0F0"], 1, 1, "no rank runs 0B0, or 0I0 and 0W0"),
        (["0F0 0W0"], 1, 1, "no rank runs 0B0, or 0I0 and 0W0"),
        (["0F0 0I0"], 1, 1, "no rank runs 0W0, the other half of 0I0"),
        (["0F0 0B0 0I0"], 1, 1, "0B0 is the whole backward, and 0I0 or 0W0 runs too"),
        (["0F0 0B0 0W0"], 1, 1, "0B0 is the whole backward, and 0I0 or 0W0 runs too"),
        (["0F0 0B0", "1B0 1F0"], 2, 1, "rank 1 (row 2), action 1 is 1B0, before 1F0"),
        (["0I0 0F0 0W0"], 1, 1, "rank 0 (row 1), action 1 is 0I0, before 0F0"),
        (["0F0 0W0 0I0"], 1, 1, "rank 0 (row 1), action 2 is 0W0, before 0I0"),
    ],
)
def test_a_fault_is_named_with_rank_row_and_action(
    ranks: Sequence[str], stages: int, microbatches: int, fault: str
) -> None:
    assert find_fault(rows(*ranks), stages, microbatches) == fault


def test_a_negative_number_is_outside() -> None:
    assert "action 1 is -1F0" in find_fault([np.array([[-1, 0, 0]])], 1, 1)


def test_a_schedule_with_a_fault_does_not_come_to_be() -> None:
    with pytest.raises(ValueError, match=r"Schedule\(rows='mine'\): no rank runs 0F0"):
        Schedule("mine", 1, 1, rows("0B0"))


schedules = st.builds(build_schedule, st.sampled_from(sorted(SCHEDULES)), st.just(2), st.just(4))


@given(schedules, st.data())
def test_an_action_that_is_lost_or_doubled_is_a_fault(
    schedule: Schedule, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, 1))
    place = data.draw(st.integers(0, len(schedule.rows[rank]) - 1))
    whole = list(schedule.rows)
    assert find_fault(whole, schedule.num_stages, 4) == ""
    whole[rank] = np.delete(schedule.rows[rank], place, axis=0)
    assert find_fault(whole, schedule.num_stages, 4).startswith("no rank runs ")
    whole[rank] = np.insert(schedule.rows[rank], 0, schedule.rows[rank][place], axis=0)
    assert find_fault(whole, schedule.num_stages, 4).endswith("and it comes again")


@given(schedules, st.data())
def test_two_actions_may_change_places_unless_they_are_of_one_stage_and_microbatch(
    schedule: Schedule, data: st.DataObject
) -> None:
    """Waiting of ranks for each other is the simulator's to find."""
    numbers = schedule.rows[0]
    first, second = sorted(data.draw(st.tuples(*[st.integers(0, len(numbers) - 1)] * 2)))
    assume(first < second)
    turned = numbers.copy()
    turned[[first, second]] = numbers[[second, first]]
    order = {str(Action(s, KINDS[k], m)): i for i, (s, k, m) in enumerate(turned.tolist())}
    wrong = any(
        order[f"{s}{later}{m}"] < order[f"{s}{earlier}{m}"]
        for s, _, m in turned.tolist()
        for earlier, later in ("FB", "FI", "IW")
        if f"{s}{later}{m}" in order and f"{s}{earlier}{m}" in order
    )
    fault = find_fault([turned, *schedule.rows[1:]], schedule.num_stages, 4)
    assert bool(fault) is wrong
    assert not fault or ", before " in fault
