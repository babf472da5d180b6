import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_align.data.conversation_formats import Example
from lightning_align.data.conversation_packing import PackedConversations, pack_best_fit
from lightning_align.data.sampler import padding


def example(ids, learned):
    return Example(np.array(ids, np.int32), np.array(learned, np.bool_), b"")


TWO = [example([5, 6, 7], [0, 1, 1]), example([8, 9], [1, 1]), example([3] * 5, [1] * 5)]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 30))
def test_every_item_is_in_one_row_and_no_row_is_too_full(lengths, size):
    rows = pack_best_fit(lengths, size)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert all(0 < length <= size for length in filled)
    assert all(row == sorted(row) for row in rows)
    # No two rows fit in one, and so all but one are filled by half.
    assert sum(2 * length <= size for length in filled) <= 1


def test_the_longest_first_into_the_fullest_row():
    assert pack_best_fit([4, 8, 1, 4, 2, 1], 10) == [[1, 2, 5], [0, 3, 4]]


def test_worked_batch():
    data = PackedConversations(TWO, 6, pad_token_id=99)
    assert data.rows == [[2], [0, 1]]
    batch = data[[1, 0]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3] * 5]
    # The first token of a conversation follows none of its own.
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, 3, 3, 3, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    wider = PackedConversations([*TWO, TWO[2]], 7, pad_token_id=99)[[0, 1]]
    assert wider["input_ids"].tolist() == [[3, 3, 3, 3, 3, 99, 99], [8, 9, 3, 3, 3, 3, 3]]
    assert wider["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 0, 1, 2, 3, 4]]
    assert wider["labels"][0].tolist() == [-100, 3, 3, 3, 3, -100, -100]


def test_a_padding_index_has_nothing_to_learn():
    data = PackedConversations(TWO, 6, pad_token_id=99)
    batch = data[[1, padding(0)]]
    assert torch.equal(batch["input_ids"], data[[1, 0]]["input_ids"])
    assert (batch["labels"] != -100).any(1).tolist() == [True, False]


def test_the_content_follows_tokens_and_rows():
    contents = {
        PackedConversations(TWO, 6, 99).content,
        PackedConversations(TWO, 7, 99).content,
        PackedConversations(TWO[:2], 7, 99).content,
    }
    assert len(contents) == 3
    with pytest.raises(IndexError):
        PackedConversations(TWO, 6, 99)[[2]]
