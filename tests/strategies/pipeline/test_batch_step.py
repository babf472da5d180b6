"""A step on a batch: its name, its micro-batches, and the few rows that are compared."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lightning_align.strategies.pipeline.batch_step import BatchStep


def training_step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...


def step(rows: int, count: int, *rest: int) -> BatchStep:
    batch = {"x": torch.arange(rows), "scale": torch.tensor(3.0), "name": "a"}
    return BatchStep(training_step, batch, rest, count, nullcontext, trains=True)


def test_loaders_of_one_method_are_told_apart_and_batches_are_not() -> None:
    kinds = [step(8, 4, batch, loader).kind for batch, loader in [(0, 0), (1, 0), (0, 1)]]
    assert kinds[0] == kinds[1] != kinds[2]
    assert all(kind.startswith("training_step") for kind in kinds)
    assert step(8, 4, 0).kind == step(8, 4, 5).kind


def test_micro_batches_make_up_the_batch() -> None:
    parts = step(6, 3).microbatches()
    assert [part["x"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("rows", "count", "expected_rows", "expected_count"),
    [(32, 4, 8, 4), (32, 32, 8, 8), (12, 3, 8, 2), (12, 6, 8, 4), (8, 2, 8, 2), (3, 3, 3, 3)],
)
def test_a_sample_is_the_first_rows_in_equal_parts(
    rows: int, count: int, expected_rows: int, expected_count: int
) -> None:
    whole = step(rows, count, 7)
    sample = whole.sample()
    assert sample.batch["x"].tolist() == list(range(expected_rows))
    assert (sample.batch["scale"], sample.batch["name"]) == (3.0, "a")
    assert sample.count == expected_count
    assert (sample.call, sample.rest, sample.trains) == (training_step, (7,), True)
    assert len(whole.batch["x"]) == rows
