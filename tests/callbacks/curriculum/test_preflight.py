"""The largest batch of a run goes through once before the first step, and leaves nothing."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_align.callbacks.curriculum.preflight import Preflight
from tests.callbacks.curriculum.test_callback import BATCHES, trained
from tests.helpers.curriculum import by_length
from tests.modules.test_pretrain import weights


class Sees(pl.Callback):
    """Every batch that the module steps on, tried out or trained."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        step = pl_module.training_step

        def noted(batch: Any, batch_idx: int) -> Any:
            self.lengths.append(batch["labels"].shape[1] - 1)
            return step(batch, batch_idx)

        pl_module.training_step = noted


@pytest.mark.parametrize("mode", ["truncate", pytest.param("reshape", marks=pytest.mark.slow)])
def test_the_longest_rows_go_first_and_change_nothing(mode: str) -> None:
    sees = Sees()
    ours, watch, trainer = trained([by_length(mode, preflight=True), sees], dropout=0.3)
    theirs, expected, _ = trained([by_length(mode)], dropout=0.3)
    assert sees.lengths[:3] == [12, 3, 6]
    assert watch.losses == expected.losses
    assert torch.equal(weights(ours), weights(theirs))
    assert not [each for each in trainer.callbacks if isinstance(each, Preflight)]


@pytest.mark.slow
def test_rows_that_do_not_grow_are_not_tried_out() -> None:
    sees = Sees()
    constant = {
        "min_difficulty": 6,
        "max_difficulty": 6,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 1, "difficulty_step": 6},
    }
    trained([by_length(scheduler=constant, preflight=True), sees])
    assert sees.lengths == [6] * 8


def test_what_would_fail_at_the_end_fails_before_the_first_step() -> None:
    """Rows of 24 tokens, where the model has 16 positions."""
    long = [{name: x.repeat(1, 2) for name, x in batch.items()} for batch in BATCHES]
    scheduler = {
        "min_difficulty": 3,
        "max_difficulty": 24,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 100, "difficulty_step": 3},
    }
    first: list[int] = []

    class Steps(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            first.append(1)

    with pytest.raises(RuntimeError, match="rows of 24 tokens, the largest batch of the run, does"):
        trained([by_length(scheduler=scheduler, preflight=True), Steps()], copy.deepcopy(long))
    assert not first
    trained([by_length(scheduler=scheduler)], long)
