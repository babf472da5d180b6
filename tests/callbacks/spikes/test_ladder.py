"""The ladder of actions: which rung an alarm gets, by its place."""

import pytest

from lightning_align.callbacks.spikes.ladder import ACCEPT, Ladder, rungs_of


def ladder(*rungs: str, max_rewinds: int = 2, max_consecutive_skips: int = 3) -> Ladder:
    return Ladder(list(rungs), max_rewinds, max_consecutive_skips)


def climbs(which: Ladder, *positions: int, finite: bool = True) -> list[str]:
    return [which.climb(position, 10, is_finite=finite) for position in positions]


def test_repeated_alarms_at_one_place_climb() -> None:
    which = ladder("clip", "skip", "rewind", "stop")
    assert climbs(which, 5, 6, 7, 8, 9) == ["clip", "skip", "rewind", "rewind", "stop"]


def test_an_alarm_elsewhere_begins_at_the_bottom() -> None:
    assert climbs(ladder("log", "skip"), 5, 15, 26, 36) == ["log", "skip", "log", "skip"]


def test_one_action_is_all_there_is() -> None:
    assert climbs(ladder("clip"), 1, 2, 3) == ["clip"] * 3
    assert climbs(ladder("rewind"), 1, 2, 3) == ["rewind", "rewind", "stop"]


def test_what_is_trained_again_climbs_by_itself_and_rewinds_count_until_it_is_past() -> None:
    """The run goes back from 50 to 20. What it meets at 30 is something else; at 50, it is not."""
    which = ladder("clip", "rewind")
    assert climbs(which, 49, 50) == ["clip", "rewind"]
    assert climbs(which, 30, 31, 50, 51) == ["clip", "rewind", "clip", "stop"]
    assert which.rewinds == 2
    assert climbs(which, 75, 76) == ["clip", "rewind"]
    assert which.rewinds == 1


def test_after_so_many_skips_in_a_row_the_level_is_a_new_one() -> None:
    which = ladder("skip")
    assert climbs(which, 1, 2, 3, 4, 5) == ["skip", "skip", "skip", ACCEPT, "skip"]
    assert climbs(ladder("skip"), 1, 2, 3, 4, finite=False)[-1] == "stop"


def test_a_step_that_is_taken_ends_the_row() -> None:
    which = ladder("skip")
    for position in range(8):
        assert which.climb(position, 10, is_finite=True) == "skip"
        which.calm()


def test_what_cannot_be_done_is_replaced() -> None:
    which = ladder("clip", "rewind")
    useless = ("clip", "rewind")
    assert [which.climb(1, 10, is_finite=True, useless=useless) for _ in range(2)] == ["skip"] * 2
    assert climbs(which, 2, 3, 4) == ["rewind", "rewind", "stop"]


@pytest.mark.parametrize(("rungs", "instead"), [(["clip"], "log"), (["clip", "skip"], "skip")])
def test_a_step_that_cannot_be_clipped_is_taken_where_none_is_to_be_left_out(
    rungs: list[str], instead: str
) -> None:
    assert ladder(*rungs).climb(1, 10, is_finite=True, useless=["clip"]) == instead
    assert ladder(*rungs).climb(1, 10, is_finite=False, useless=["clip"]) == "skip"


def test_the_state_round_trips() -> None:
    which, other = (ladder("clip", "rewind", "stop") for _ in range(2))
    climbs(which, 1, 2)
    other.load_state_dict(which.state_dict())
    assert other.state_dict() == which.state_dict()
    assert climbs(other, 3, 4) == ["rewind", "stop"]


def test_a_state_of_before_counts_its_rewinds() -> None:
    """It has no place that they went back from; the last alarm's is near it."""
    which, other = ladder("rewind"), ladder("rewind")
    climbs(which, 50, 51)
    state = which.state_dict()
    del state["rewound"]
    other.load_state_dict(state)
    assert climbs(other, 45) == ["stop"]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("shout", "must be one of 'log', 'clip', 'skip', 'rewind', 'stop'"),
        ([], "at least one of"),
        (["skip", "clip"], "in this order"),
        (["skip", "skip"], "once"),
    ],
)
def test_ladders_that_are_refused(action: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rungs_of(action)  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["max_rewinds", "max_consecutive_skips"])
def test_numbers_below_one_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        ladder("skip", **{argument: 0})
