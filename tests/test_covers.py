"""The helper that thins out products loses no combination and meets each value by default."""

import pytest

from tests.helpers.covers import cover, with_slow


def test_each_value_is_met_and_all_combinations_are_there() -> None:
    mark = cover(place={"disk": 0, "memory": 1}, window=[1, 2, 3], kind=[int, str]).mark
    names, combinations = mark.args
    assert names == ("place", "window", "kind")
    assert len({each.values for each in combinations}) == len(combinations) == 2 * 3 * 2
    default = [each for each in combinations if not each.marks]
    assert [each.id for each in default] == ["disk-1-int", "disk-3-int", "memory-2-str"]
    slow = [each.marks for each in combinations if each.marks]
    assert {mark.name for (mark,) in slow} == {"slow"}


def test_axes_of_one_length_do_not_go_in_step() -> None:
    mark = cover(first=[1, 2, 3, 4], second=[1, 2], third=[1, 2]).mark
    pairs = {each.values[1:] for each in mark.args[1] if not each.marks}
    assert pairs == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_two_values_of_one_name_are_no_axis() -> None:
    with pytest.raises(AssertionError, match="two values of one name"):
        cover(number=[1, "1"])


def test_all_but_some_are_slow() -> None:
    found = with_slow(["a", "b", "c"], ["b"])
    assert [(each.values, bool(each.marks)) for each in found] == [
        (("a",), True),
        (("b",), False),
        (("c",), True),
    ]
    with pytest.raises(AssertionError, match="a name that none has"):
        with_slow(["a"], ["z"])
