import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_align.data.skipped import SkippedBatches

pairs = st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair)))
ranges = st.lists(pairs, max_size=6)
END = 80  # behind all of them


def numbers(ranges: list[tuple[int, int]]) -> set[int]:
    return {n for first, last in ranges for n in range(first, last)}


@given(ranges)
def test_ranges_are_sorted_disjoint_and_as_few_as_can_be(ranges: Any) -> None:
    skipped = SkippedBatches(ranges)
    assert numbers(list(skipped.ranges)) == numbers(ranges)
    assert len(skipped) == len(numbers(ranges))
    ends = [end for pair in skipped.ranges for end in pair]
    assert all(one < other for one, other in itertools.pairwise(ends))


@given(ranges)
def test_counting_and_its_inverse(ranges: Any) -> None:
    """The batches that are kept, in order, are the stream without the others."""
    skipped, out = SkippedBatches(ranges), numbers(ranges)
    kept = [n for n in range(END) if n not in out]
    assert [skipped.position_of(n) for n in range(len(kept))] == kept
    for position in range(END):
        assert (position in skipped) == (position in out)
        assert skipped.kept_before(position) == sum(n < position for n in kept)
        assert skipped.skipped_before(position) == sum(n < position for n in out)
        following = skipped.kept_from(position)
        assert next(following) == min(n for n in [*kept, END] if n >= position)


@given(ranges, ranges, st.integers(-70, 70))
def test_union_rest_and_shift(some: Any, others: Any, by: int) -> None:
    skipped = SkippedBatches(some)
    assert numbers([*(skipped | SkippedBatches(others)).ranges]) == numbers(some) | numbers(others)
    assert numbers([*skipped.behind(by).ranges]) == {n for n in numbers(some) if n >= by}
    assert numbers([*skipped.shifted(by).ranges]) == {n + by for n in numbers(some) if n + by >= 0}


@given(ranges)
def test_plain_data_is_the_same_again(ranges: Any) -> None:
    skipped = SkippedBatches(ranges)
    assert SkippedBatches(skipped.plain()) == SkippedBatches.of(skipped.plain()) == skipped


@given(st.integers(0, 50), st.integers(0, 50))
def test_a_number_is_what_checkpoints_had_before_there_were_ranges(number: int, kept: int) -> None:
    """It was added to whatever had been trained."""
    assert SkippedBatches.of(number).position_of(kept) == number + kept


@pytest.mark.parametrize(
    "wrong", [[(3, 2)], [(-1, 2)], [(1, 2, 3)], [(1.0, 2)], [(True, 2)], [4], -3, [("a", "b")]]
)
def test_refuses(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"SkippedBatches\(ranges=.*\): must be pairs"):
        SkippedBatches.of(wrong)
