"""Curriculum: rows of every batch have the length of its number, and nothing else is changed."""

import csv
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from lightning_align import Curriculum, TokenSchedule
from lightning_align.data.sequence_length import RowCutter
from tests.helpers.curriculum import WHOLE, Watch, by_length, linear
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.resume import SequenceData
from tests.modules.test_pretrain import fit, gpt2, rows, sgd_module, weights

GROWING = [3, 6, 6, 9, 9, 12, 12, 12]  # of ``linear()``: batch n has the length of step n + 1
BATCHES = [rows(n, n + 1, n + 2) for n in range(8)]


def whole(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every token of a row is learned."""
    return {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}


def trained(
    callbacks: list[pl.Callback], batches: Any = BATCHES, **options: Any
) -> tuple[pl.LightningModule, Watch, pl.Trainer]:
    watch, module = Watch(), sgd_module(gpt2(options.pop("dropout", 0.0)))
    trainer = fit(module, batches, callbacks=[*callbacks, watch], **options)
    return module, watch, trainer


@pytest.mark.parametrize(
    ("mode", "accumulate"),
    [
        ("truncate", 1),
        ("reshape", 2),
        pytest.param("truncate", 2, marks=pytest.mark.slow),
        pytest.param("reshape", 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_equals_one_on_batches_that_were_cut_by_hand(mode: str, accumulate: int) -> None:
    """To the bit, with rows of unequal length in a window; the module is told nothing."""
    ours, watch, trainer = trained([by_length(mode)], accumulate_grad_batches=accumulate)
    assert watch.lengths == GROWING
    cut = [RowCutter(mode).cut(b, n)[0] for b, n in zip(BATCHES, GROWING, strict=True)]
    theirs, _, _ = trained([], cut, accumulate_grad_batches=accumulate)
    assert torch.equal(weights(ours), weights(theirs))
    plain, _, _ = trained([], accumulate_grad_batches=accumulate)
    assert not torch.equal(weights(ours), weights(plain))
    assert trainer.callback_metrics["curriculum/length"] == 12


def test_whoever_counts_tokens_counts_those_that_are_left() -> None:
    schedule = TokenSchedule(max_tokens=10_000, schedule="constant")
    curriculum = by_length()
    module, _, trainer = trained([schedule, curriculum], [whole(b) for b in BATCHES])
    assert schedule.tokens_seen == module.tokens_seen == 3 * sum(GROWING)
    lost = trainer.callback_metrics["curriculum/tokens_lost"]
    assert lost == 3 * (8 * WHOLE - sum(GROWING))


class Unsized(IterableDataset):
    """Batches without a length: Lightning draws one ahead."""

    def __iter__(self) -> Any:
        return iter(BATCHES)


def test_a_loader_that_runs_ahead_has_the_same_lengths() -> None:
    watch, curriculum = Watch(), by_length("reshape")
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, callbacks=[curriculum, watch], **options)
    module = sgd_module(gpt2())
    trainer.fit(module, DataLoader(Unsized(), batch_size=None))
    assert watch.lengths == [*GROWING, *[12] * 8]


def data_run(folder: Path, *callbacks: pl.Callback, **options: Any) -> tuple[Watch, pl.Trainer]:
    watch = Watch()
    ckpt_path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        default_root_dir=folder,
        callbacks=[*callbacks, watch],
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(sgd_module(gpt2(0.1)), SequenceData(), ckpt_path=ckpt_path)
    return watch, trainer


def test_a_resume_goes_on_with_the_lengths_and_counts_and_validation_is_whole(
    tmp_path: Path,
) -> None:
    saving = partial(ModelCheckpoint, tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    full, trainer = data_run(tmp_path, by_length(), saving())
    assert all(labels.shape[1] == WHOLE + 1 for labels in full.validated)
    assert len(full.validated) > 0
    resumed, again = data_run(tmp_path, by_length(), ckpt_path=str(tmp_path / "step=3.ckpt"))
    assert resumed.losses == {n: loss for n, loss in full.losses.items() if n > 3}
    key = "curriculum/tokens_lost"
    assert again.callback_metrics[key] == trainer.callback_metrics[key] > 0
    other = by_length(scheduler=linear(total=7))
    with pytest.raises(ValueError, match="the checkpoint was written with another one"):
        data_run(tmp_path, other, ckpt_path=str(tmp_path / "step=3.ckpt"))


def test_changes_are_planned_where_a_row_gets_longer() -> None:
    planned: dict[int, str | None] = {}
    curriculum = by_length()

    class Asks(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            planned.update({n: curriculum.planned_change(n) for n in range(8)})

    trained([curriculum, Asks()])
    assert {n: each for n, each in planned.items() if each} == {
        1: "Curriculum: rows of 6 tokens",
        3: "Curriculum: rows of 9 tokens",
        5: "Curriculum: rows of 12 tokens",
    }
    assert curriculum.planned_change(1) is None, "no run, no plan"


def test_preview_tells_batches_before_and_without_a_run() -> None:
    found = by_length().preview([0, 2, 7])
    assert [row["length"] for row in found] == [3, 6, 12]
    own = {"block_size": WHOLE, "global_batch_size": 3}
    curriculum = by_length(scheduler=linear(total_curriculum_tokens=100), **own)
    _, watch, _ = trained([curriculum])
    rows = curriculum.preview(range(8))
    assert [row["length"] for row in rows] == watch.lengths
    assert rows[3]["tokens"] == 3 * sum(watch.lengths[:3])


def test_a_scheduler_by_steps_beside_a_warm_up_by_length_is_warned_of_once() -> None:
    scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    module = sgd_module(gpt2(), lr_scheduler=scheduler)
    with pytest.warns(UserWarning, match="scheduled by steps, and steps have fewer") as caught:
        fit(module, BATCHES, callbacks=[by_length()])
    assert len([each for each in caught if "Curriculum" in str(each.message)]) == 1


def test_what_may_not_be_meant_is_said() -> None:
    """More lengths than a compiler keeps, and a run that ends before they are through."""
    scheduler = linear(total=40, each=1)
    module = sgd_module(gpt2())
    module.__dict__["_compiler_ctx"] = {}
    with pytest.warns(UserWarning, match="Curriculum") as caught:
        fit(module, BATCHES, callbacks=[by_length(scheduler=scheduler)])
    said = [str(each.message) for each in caught if "Curriculum" in str(each.message)]
    assert len(said) == 2
    assert "there are 10 lengths, and torch.compile gives up silently after 8 shapes" in said[0]
    assert "training ended at rows of 4 tokens, and the schedule goes on to 12" in said[1]


@pytest.mark.slow
def test_values_are_logged_where_they_change_and_where_loggers_look(tmp_path: Path) -> None:
    """Four lengths in 24 steps, and a line every fourth step: each with what holds there."""
    logger = CSVLogger(tmp_path, version="")
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=4,
        callbacks=[by_length("reshape")],
        **options,
    )
    trainer.fit(sgd_module(gpt2()), DataLoader(BATCHES * 3, batch_size=None))
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    found = {int(row["step"]): float(row["curriculum/length"]) for row in rows}
    assert found == {3: 9, 7: 12, 11: 12, 15: 12, 19: 12, 23: 12}


REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "one of order, length, batch_size and mixture must be given"),
    "no mapping": ({"length": 8}, r"length=8\): must be a mapping"),
    "an unknown key": (
        {"length": {"mode": "truncate", "scheduler": linear(), "lenght": 3}},
        r"\['lenght'\]\): knows mode, scheduler",
    ),
    "no scheduler": ({"length": {"mode": "truncate"}}, "needs scheduler"),
    "no such mode": (
        {"length": {"mode": "cut", "scheduler": linear()}},
        "length.mode='cut'",
    ),
    "an end of reshaped rows": (
        {
            "length": {
                "mode": "reshape",
                "scheduler": linear(),
                "preserve_end_of_sequence": True,
            }
        },
        "belongs to mode='truncate'",
    ),
    "half a length": (
        {"length": {"mode": "truncate", "scheduler": linear(), "max_lengths": 2.5}},
        "must be a whole number",
    ),
    "no PNG": (
        {"length": {"mode": "truncate", "scheduler": linear()}, "filename": "a.jpg"},
        "must end in '.png'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused(name: str) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        Curriculum(**arguments)


def test_what_a_run_cannot_follow_is_refused_before_it_trains() -> None:
    with pytest.raises(ValueError, match="the Trainer has 2 of them"):
        trained([by_length(), Named(by_length())])
    with pytest.raises(ValueError, match="no datamodule of the run has a tokenizer"):
        trained([by_length(preserve_end_of_sequence=True)])
    pairs = [{**rows(0), "completion_mask": torch.ones(1, WHOLE + 1)}]
    with pytest.raises(ValueError, match="would cut completions"):
        trained([by_length()], pairs)


def Named(curriculum: Curriculum) -> Curriculum:  # noqa: N802
    """One that Lightning takes for another callback."""

    class Another(Curriculum):
        state_key = "another"

    curriculum.__class__ = Another
    return curriculum


@pytest.mark.slow
def test_what_two_ranks_have_lost_is_added_up_and_resumed(tmp_path: Path) -> None:
    """Each rank counts its own; a resume by one rank goes on with what both have lost."""
    (tmp_path / "one").mkdir()

    def on(rank: int) -> tuple[float, int]:
        saving = [ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)]
        curriculum = by_length()
        options = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        _, trainer = data_run(tmp_path, curriculum, *saving, **options)
        return float(trainer.callback_metrics["curriculum/tokens_lost"]), curriculum._length.lost

    (logged, first), (_, second) = run_ranks(on, timeout_s=120.0)
    assert logged == first + second
    assert min(first, second) > 0
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["lightning_align.curriculum"]
    assert len(state) == 2
    alone = by_length()
    trainer: Any = SimpleNamespace(world_size=1, global_rank=0, is_global_zero=True)
    module: Any = None
    alone.on_load_checkpoint(trainer, module, {"lightning_align.curriculum": state})
    alone.load_state_dict(by_length().state_dict())
    assert alone._length.lost == sum(state)
