from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_align.data.truncation import TRUNCATION_MODES, count_cut, cut_row


def ids(number, start=0):
    return np.arange(start, start + number, dtype=np.int32)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 20), st.sampled_from(TRUNCATION_MODES))
def test_a_row_keeps_its_first_or_its_last_tokens(prompt, completion, max_length, mode):
    whole = [*range(prompt + completion)]
    kept = cut_row(ids(prompt), ids(completion, prompt), max_length, mode)
    expected = whole[:max_length] if mode == "keep_start" else whole[-max_length:]
    assert [*kept[0], *kept[1]] == expected
    assert all(token < prompt for token in kept[0])
    assert all(token >= prompt for token in kept[1])


@pytest.mark.parametrize(
    ("max_length", "mode", "expected"),
    [
        (9, "keep_start", {}),
        (9, "keep_end", {}),
        (6, "keep_start", {"the end of the completion": 1}),
        (6, "keep_end", {"the beginning of the prompt": 1}),
        (4, "keep_end", {"the whole prompt": 1}),
        (3, "keep_end", {"the whole prompt": 1}),
    ],
)
def test_what_a_row_has_lost_is_counted(max_length, mode, expected):
    whole, lost = (ids(5), ids(4, 5)), Counter()
    count_cut(lost, whole, cut_row(*whole, max_length, mode))
    assert lost == expected
