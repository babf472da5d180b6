import math
import traceback

import numpy
import pytest

from lightning_align._errors import (
    add_note,
    argument_error,
    check_choice,
    check_least,
    check_whole,
    finite_number,
)


def test_message_gives_place_value_rule_and_way_out() -> None:
    error = argument_error("LISA", "activated_layers", 40, "the model has 32 blocks", "Lower it")
    assert isinstance(error, ValueError)
    assert str(error) == "LISA(activated_layers=40): the model has 32 blocks. Lower it."


def test_way_out_may_be_left_out() -> None:
    assert str(argument_error("A", "b", "c", "must be d")) == "A(b='c'): must be d."


def test_the_first_value_below_the_least_is_refused() -> None:
    check_least("A", 1, b=1, c=2)
    with pytest.raises(ValueError, match=r"^A\(c=0\): must be at least 1\.$"):
        check_least("A", 1, b=1, c=0, d=-1)


def test_a_count_is_an_int() -> None:
    check_whole("A", b=1, c=numpy.int64(2))
    with pytest.raises(ValueError, match=r"^A\(c=100\.0\): must be a whole number, an int\.$"):
        check_whole("A", b=1, c=1e2)


def test_a_choice_is_one() -> None:
    check_choice("A", "mode", "a", ("a", "b"))
    with pytest.raises(ValueError, match=r"^A\(mode='c'\): must be one of 'a', 'b'\.$"):
        check_choice("A", "mode", "c", {"a": 1, "b": 2})
    with pytest.raises(ValueError, match=r"^A\(mode=\[\]\): must be one of 'a', 'b'\.$"):
        check_choice("A", "mode", [], {"a": 1, "b": 2})


def test_a_value_that_cannot_be_shown_is_named_by_its_type() -> None:
    assert str(argument_error("A", "b", 10**5000, "c")).startswith("A(b=<int: Exceeds the limit")
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert str(argument_error("A", "b", deep, "c")).startswith("A(b=<list: maximum recursion")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, True, "1", None])
def test_what_is_no_finite_number(value: object) -> None:
    assert finite_number(value) is None


def test_a_finite_number_is_a_float() -> None:
    assert [finite_number(value) for value in (3, -0.5)] == [3.0, -0.5]


def test_a_long_value_leaves_room_for_the_rule():
    records = [{"text": "a word"}] * 10_000
    message = str(argument_error("A", "b", records, "must be d"))
    assert len(message) < 600
    assert message.startswith("A(b=[{'text'")
    assert message.endswith("characters)): must be d.")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("rule"),
        OSError(28, "no space", "a"),
        KeyError(),
        ImportError("no name"),
        SyntaxError("bad"),
    ],
)
@pytest.mark.parametrize("has_notes", [True, False])
def test_a_note_is_in_the_traceback(error: Exception, has_notes: bool) -> None:
    """Also in Python 3.10, which has none."""
    kind = type(error)

    class Without(kind):
        @property
        def add_note(self) -> None:
            raise AttributeError

    error = kind(*error.args) if has_notes else Without(*error.args)
    said = str(error)
    add_note(error, "rank 1 was first")
    told = "".join(traceback.format_exception(error))
    assert "rank 1 was first" in told
    assert said.split("'")[0] in told
