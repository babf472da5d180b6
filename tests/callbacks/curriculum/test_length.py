"""The length of a curriculum, by itself: what it cuts, counts, and says."""

from typing import Any

import pytest
import torch

from lightning_align.callbacks.curriculum.length import LengthPart
from lightning_align.data.length_schedule import Samples
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.curriculum import linear

BATCH = {"input_ids": torch.arange(26).view(2, 13), "labels": torch.arange(26).view(2, 13)}


def part(**options: Any) -> LengthPart:
    made = LengthPart({"mode": "truncate", "scheduler": linear(), **options})
    made.set_up(None, ByteTokenizer())
    return made


def test_what_is_lost_counts_when_its_batch_is_trained_and_not_when_it_is_drawn() -> None:
    """Lengths 3, 6, 6 of 12; batch 1 is drawn again where a loader begins anew."""
    length = part()
    for n in (0, 1, 1, 2):
        assert length.cut(BATCH, n)["labels"].shape[1] - 1 == (3 if n == 0 else 6)
    assert length.lost == 0
    length.count(0)
    assert length.lost == 2 * 9
    length.count(2)  # batch 1 is passed over
    assert length.lost == 2 * 9 + 2 * 6
    length.count(1)
    assert length.lost == 2 * 9 + 2 * 6, "it is forgotten"


def test_an_end_of_text_is_the_tokenizers_or_the_one_that_is_given() -> None:
    row = torch.tensor([[5, 6, 7, 8, 0]])
    batch = {"input_ids": row, "labels": row}
    assert part(preserve_end_of_sequence=True).cut(batch, 0)["input_ids"][0, -1] == 0
    assert part(preserve_end_of_sequence=0).cut(batch, 0)["input_ids"][0, -1] == 0
    assert part(preserve_end_of_sequence=9).cut(batch, 0)["input_ids"][0, -1] == 8


def test_samples_that_a_datamodule_tells_are_the_default() -> None:
    tokens = linear(total_curriculum_tokens=100)
    given = LengthPart(
        {"mode": "truncate", "scheduler": tokens, "block_size": 12, "global_batch_size": 5}
    )
    given.set_up(None, None)
    told = LengthPart({"mode": "truncate", "scheduler": tokens})
    told.set_up(Samples.constant(5, 12), None)
    assert told.schedule.stretches() == given.schedule.stretches()
    with pytest.raises(ValueError, match="needs to know how many a batch has"):
        LengthPart({"mode": "truncate", "scheduler": tokens}).set_up(None, None)


def test_it_says_which_lengths_there_are() -> None:
    assert part().described() == "truncate to 4 lengths (3, 6, 9, 12)"
    many = part(scheduler=linear(total=40, each=1))
    assert many.described() == "truncate to 10 lengths (from 3 to 12)"
    assert part().settings() == {
        "mode": "truncate",
        "unit": "step",
        "lengths": [[1, 3], [2, 6], [4, 9], [6, 12]],
        "preserve_end_of_sequence": False,
    }
