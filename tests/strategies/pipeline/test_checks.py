"""What a pipeline refuses before it trains anything, asked directly."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, OnExceptionCheckpoint
from torch import distributed

from lightning_align import PipelineStrategy
from lightning_align.strategies.pipeline.checks import (
    check_batch,
    check_count,
    check_module,
    check_settings,
)
from tests.helpers.pipelines import Chained
from tests.helpers.ranks import run_ranks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "1f1b"}, r"\(schedule='1f1b'\): must be one of \['GPipe', '1F1B', 'Inter"),
        ({"num_microbatches": 2.5}, r"\(num_microbatches=2.5\): must be a whole number"),
        ({"num_microbatches": 0}, r"\(num_microbatches=0\): must be an integer of at least 1"),
        (
            {"num_stages_per_rank": 0},
            r"\(num_stages_per_rank=0\): must be an integer of at least 1",
        ),
        (
            {"num_stages_per_rank": 2},
            r"\(num_stages_per_rank=2\): 1F1B has one stage .* Use schedule='Interleaved1F1B'",
        ),
        (
            {"schedule": "Interleaved1F1B", "num_stages_per_rank": 1},
            r"Interleaved1F1B needs at least 2 stages on each rank\. Use schedule='1F1B'",
        ),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineStrategy(**arguments)


@pytest.mark.parametrize(
    ("schedule", "num_stages", "wanted", "message"),
    [
        ("1F1B", 2, 1, r"\(num_microbatches=1\): 1F1B needs at least as many .*, 2\. Use sch"),
        ("Interleaved1F1B", 4, 5, r"\(num_microbatches=5\): .* needs a multiple of 2 .* Use 4"),
    ],
)
def test_a_count_that_the_schedule_cannot_run(
    schedule: str, num_stages: int, wanted: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_count(schedule, num_stages, 2, wanted)
    for other in (None, 4):
        check_count(schedule, num_stages, 2, other)
    check_count("GPipe", num_stages, 2, wanted)


def trainer_of(**loader: Any) -> Any:
    return SimpleNamespace(train_dataloader=SimpleNamespace(**loader))


@pytest.mark.parametrize(
    "loader",
    [{}, {"batch_size": 8}, {"batch_size": None, "sampler": SimpleNamespace(batch_size=8)}],
)
def test_full_batches_must_be_cut_into_equal_parts(loader: dict[str, Any]) -> None:
    rows = 2 if loader else 8  # the run may begin with a ragged batch
    check_batch(trainer_of(**loader), rows, 4)
    check_batch(trainer_of(**loader), rows, None)
    with pytest.raises(ValueError, match=r"=3\): batches of 8 rows cannot be cut .* Use 2, or"):
        check_batch(trainer_of(**loader), rows, 3)


class OfItsOwn(ModelCheckpoint):
    def on_exception(self, *_: Any) -> None:
        """Saves nothing of the model."""


SAVING: list[tuple[pl.Callback, bool]] = [
    (ModelCheckpoint(save_on_exception=True), True),
    (OnExceptionCheckpoint("."), True),
    (ModelCheckpoint(), False),
    (OfItsOwn(save_on_exception=True), False),
]


@pytest.mark.parametrize(("callback", "refused"), SAVING)
@pytest.mark.parametrize("ranks", [1, 2])
def test_no_rank_saves_alone_when_it_fails(callback: Any, refused: bool, ranks: int) -> None:
    trainer: Any = SimpleNamespace(callbacks=[callback], world_size=ranks)
    told = pytest.raises(ValueError, match="it saves when a rank fails, and a checkpoint takes")
    with told if refused and ranks > 1 else nullcontext():
        check_module(trainer, Chained())


def test_a_class_that_inherits_from_a_refused_callback_is_refused() -> None:
    trainer: Any = SimpleNamespace(callbacks=[BackboneFinetuning()], world_size=1)
    with pytest.raises(ValueError, match=r"\(callbacks='BackboneFinetuning'\): it needs the whole"):
        check_module(trainer, Chained())


def test_settings_that_differ_between_stages_are_named_on_all_ranks() -> None:
    def check(rank: int) -> None:
        group, cpu = distributed.group.WORLD, torch.device("cpu")
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.AdamW([weight], lr=torch.tensor(0.1))
        optimizer.param_groups[0]["eps"] = float("nan")  # which equals nothing, not even itself
        check_settings(optimizer, group, cpu)()
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1 * (rank + 1))
        message = r"\(optimizer='AdamW'\): .* settings, and 'lr' of group 0 is 0\.1 to 0\.2\. Let"
        ends = check_settings(optimizer, group, cpu)
        with pytest.raises(ValueError, match=message):
            ends()

    run_ranks(check)
