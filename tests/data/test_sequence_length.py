"""Rows cut to a length: which predictions are left, which are lost, and what is refused."""

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BatchEncoding

from lightning_align.data.sequence_length import RowCutter, with_rows


def aligned(rows: int, width: int, **extra: Tensor) -> dict[str, Tensor]:
    ids = torch.arange(rows * width).view(rows, width)
    return {"input_ids": ids, "labels": ids.clone(), **extra}


def predictions(batch: dict[str, Tensor]) -> Counter[tuple[int, int]]:
    """(token before, target) of everything that a step learns."""
    pairs = zip(batch["input_ids"][:, :-1].flatten(), batch["labels"][:, 1:].flatten(), strict=True)
    return Counter((int(before), int(target)) for before, target in pairs if target != -100)


def test_truncate_keeps_the_beginning_of_each_row_and_counts_the_rest() -> None:
    batch = aligned(2, 9)
    batch["labels"][1, 8] = -100  # is no prediction, and is not lost
    cut, lost = RowCutter("truncate").cut(batch, 4)
    assert cut["input_ids"].tolist() == [[0, 1, 2, 3, 4], [9, 10, 11, 12, 13]]
    assert predictions(cut) == Counter({(k, k + 1): 1 for k in [0, 1, 2, 3, 9, 10, 11, 12]})
    assert lost == 7
    assert batch["input_ids"].shape == (2, 9)


def test_reshape_makes_rows_that_share_a_token_and_loses_no_prediction() -> None:
    """T = 8 and L = 4, as the blocks of packed text: tokens 0 to 4, and 4 to 8."""
    batch = aligned(2, 9)
    cut, lost = RowCutter("reshape").cut(batch, 4)
    assert cut["input_ids"].tolist() == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [9, 10, 11, 12, 13],
        [13, 14, 15, 16, 17],
    ]
    assert lost == 0
    assert predictions(cut) == predictions(batch)


@given(rows=st.integers(1, 3), whole=st.integers(1, 30), length=st.integers(1, 40))
def test_what_is_cut_and_what_is_lost_are_all_that_was_there(
    rows: int, whole: int, length: int
) -> None:
    batch = aligned(rows, whole + 1)
    for mode in ("truncate", "reshape"):
        cut, lost = RowCutter(mode).cut(batch, length)
        assert predictions(cut) <= predictions(batch)
        assert predictions(cut).total() + lost == rows * whole
        each = min(length, whole)
        assert lost == rows * (whole - each if mode == "truncate" else whole % each)
        assert cut["input_ids"].shape[1] == each + 1


def test_rows_that_are_short_enough_are_left_as_they_are() -> None:
    batch = aligned(2, 9)
    for mode in ("truncate", "reshape"):
        cut, lost = RowCutter(mode).cut(batch, 8)
        assert lost == 0
        assert cut["input_ids"] is batch["input_ids"]


def test_positions_of_separate_documents_start_anew_where_a_row_does() -> None:
    """A document of 6 tokens and one of 3; the second row begins with its fifth token."""
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2]])
    cut, _ = RowCutter("reshape").cut(aligned(1, 9, position_ids=positions), 4)
    assert cut["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]
    cut, _ = RowCutter("truncate").cut(aligned(1, 9, position_ids=positions), 4)
    assert cut["position_ids"].tolist() == [[0, 1, 2, 3, 4]]


def test_a_row_that_ended_with_an_end_of_text_keeps_it() -> None:
    end = 7
    ids = torch.tensor([[1, 2, 3, 4, end], [1, 2, 3, 4, 5], [1, end, 0, 0, 0], [1, 2, 3, end, 0]])
    mask = torch.tensor([[1] * 5, [1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    cut, _ = RowCutter("truncate", end_of_text=end).cut(batch, 2)
    assert cut["input_ids"].tolist() == [[1, 2, end], [1, 2, 3], [1, end, 0], [1, 2, end]]
    assert cut["labels"].tolist() == [[1, 2, end], [1, 2, 3], [1, end, -100], [1, 2, end]]
    assert ids[0].tolist() == [1, 2, 3, 4, end], "the batch is not written to"
    cut, _ = RowCutter("truncate").cut(batch, 2)
    assert cut["input_ids"][0].tolist() == [1, 2, 3]


def test_shifted_targets_of_a_tuple_lose_nothing_either() -> None:
    row = torch.arange(13)
    batch = row[None, :-1], row[None, 1:]
    (inputs, targets), lost = RowCutter("reshape", shifted_labels=True).cut(batch, 4)
    assert inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert torch.equal(targets, inputs + 1)
    assert lost == 0
    (inputs, targets), lost = RowCutter("truncate", shifted_labels=True).cut(batch, 5)
    assert (inputs.shape, targets[0, -1], lost) == ((1, 5), 5, 7)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def test_batches_keep_their_class_and_several_of_them_are_cut_each() -> None:
    rows = torch.arange(9)[None]
    cutter = RowCutter("truncate", shifted_labels=True)
    pair, lost = cutter.cut(Pair(rows, rows), 4)
    assert isinstance(pair, Pair)
    assert (pair.x.shape, lost) == ((1, 4), 5)
    encoding = BatchEncoding({"input_ids": rows, "source": "a book"})
    cut, _ = RowCutter("truncate").cut(encoding, 4)
    assert isinstance(cut, BatchEncoding)
    assert cut["input_ids"].shape == (1, 5)
    assert cut["source"] == "a book"
    assert encoding["input_ids"].shape == (1, 9)
    both, lost = RowCutter("truncate").cut({"a": aligned(1, 9), "b": [aligned(2, 6), None]}, 4)
    assert both["a"]["input_ids"].shape == (1, 5)
    assert both["b"][0]["labels"].shape == (2, 5)
    assert both["b"][1] is None
    assert lost == 4 + 2
    alone, _ = RowCutter("reshape").cut(rows, 4)
    assert alone.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]


PADDED = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0]])
REFUSED: dict[str, tuple[Any, str, str]] = {
    "one dimension": (
        aligned(2, 9, lengths=torch.tensor([9, 9])),
        "truncate",
        r"'lengths': \(2,\)\}\): 'lengths' cannot be cut: it must have a value for each of the 9",
    ),
    "nothing but one dimension": (torch.arange(9), "truncate", r"\(9,\)\}\): holds nothing of"),
    "a mask of pairs of tokens": (
        aligned(2, 9, attention_mask=torch.ones(2, 1, 9, 9)),
        "truncate",
        r"'attention_mask' cannot be cut",
    ),
    "another width": (aligned(2, 9, weights=torch.ones(2, 8)), "reshape", "'weights' cannot be"),
    "completions": (
        aligned(2, 9, completion_mask=torch.ones(2, 9)),
        "truncate",
        r"would cut completions, which are learned from\. Give order instead",
    ),
    "padding, reshaped": (
        aligned(1, 9, attention_mask=PADDED),
        "reshape",
        r"some would be of nothing else\. Give order instead",
    ),
    "padding on the left": (
        aligned(1, 9, attention_mask=PADDED.flip(1)),
        "truncate",
        "Pad on the right",
    ),
    "texts of rows": ({**aligned(2, 9), "text": ["a", "b"]}, "reshape", "becomes more rows"),
    "a tuple": ((torch.zeros(1, 9), torch.zeros(1, 9)), "truncate", "Set length.shifted_labels"),
    "another class": ("text", "truncate", "a batch of this class cannot be cut"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_mean_something_else_is_refused(name: str) -> None:
    batch, mode, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        RowCutter(mode).cut(batch, 4)


def test_a_reshaped_row_has_no_end_to_keep() -> None:
    with pytest.raises(ValueError, match="belongs to mode='truncate'"):
        RowCutter("reshape", end_of_text=0)
    with pytest.raises(ValueError, match="must be one of 'truncate', 'reshape'"):
        RowCutter("cut")


def test_a_batch_of_more_rows_has_the_same_over_and_over() -> None:
    batch = {"input_ids": torch.arange(6).view(2, 3), "pair": (torch.arange(2), "a")}
    more = with_rows(batch, 5)
    assert more["input_ids"][:, 0].tolist() == [0, 3, 0, 3, 0]
    assert more["pair"][0].tolist() == [0, 1, 0, 1, 0]
    assert more["pair"][1] == "a"
    assert with_rows(batch, 1)["input_ids"].tolist() == [[0, 1, 2]]
    assert with_rows(torch.tensor(3), 4) == 3
