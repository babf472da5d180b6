"""Means that can be merged, and which pairs they are over."""

import pytest
import torch

from lightning_align.losses import CompletionLogps, Mean, pairs_that_count


def test_totals_and_counts_add_up_where_means_do_not():
    parts = [Mean(torch.tensor(2.0), torch.tensor(1)), Mean(torch.tensor(3.0), torch.tensor(4))]
    merged = Mean(sum(part.total for part in parts), sum(part.count for part in parts))
    assert merged.value == 1
    assert sum(part.value for part in parts) / 2 == pytest.approx(1.375)


def test_a_pair_counts_with_either_side():
    lengths, blank = torch.tensor([1, 1, 0, 0, 1, 0, 1, 0]), torch.zeros(8)
    scored = CompletionLogps(blank, lengths, blank, blank, blank, blank[:, None])
    assert pairs_that_count(scored).tolist() == [True, True, True, False]
