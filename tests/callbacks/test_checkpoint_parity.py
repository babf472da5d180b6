"""AsyncCheckpoint against Lightning's ModelCheckpoint beside it, over a grid of their arguments.

Both are in one Trainer, so they see the same run. Where they part, it is on purpose: a save of a
step that a validation follows waits for it and ranks by its value, where ModelCheckpoint ranks by
the value before, or saves nothing; and ``save_last`` keeps the newest at every trigger.
"""

import itertools
import logging
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_align import AsyncCheckpoint
from lightning_align.callbacks.checkpoint_monitor import score_of
from lightning_align.callbacks.checkpoint_standing import standing
from lightning_align.checkpointing.retention import Retention
from tests.helpers.covers import with_slow

BATCHES = 6  # of an epoch
nan, inf = math.nan, math.inf


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of files
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Logs(pl.LightningModule):
    """Logs the n-th value in the n-th validation, and in the n-th batch."""

    def __init__(self, values: tuple[float, ...]) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.validated, self.trained = itertools.cycle(values), itertools.cycle(values)
        self.logged: dict[int, float] = {}  # step -> value of the validation behind it

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.log("loss", next(self.trained))
        return self.layer(batch).sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.logged[self.trainer.global_step] = next(self.validated)
        self.log("val", self.logged[self.trainer.global_step])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(BATCHES, 2), batch_size=1)

    val_dataloader = train_dataloader


class KeyByFolder:
    """Callbacks that differ in nothing else may be in one Trainer."""

    @property
    def state_key(self) -> str:
        return f"{super().state_key} {self.dirpath}"


class Theirs(KeyByFolder, ModelCheckpoint):
    pass


class Ours(KeyByFolder, AsyncCheckpoint):
    pass


def fit(*callbacks: pl.Callback, folder: Path, module: Logs, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 1,
            "callbacks": list(callbacks),
            "default_root_dir": str(folder),
            **options,
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module)
    return trainer


RUNS: dict[str, dict[str, Any]] = {
    "validation after every epoch": {},
    "every second epoch": {"check_val_every_n_epoch": 2},
    "twice in an epoch": {"val_check_interval": 3},
    "across epochs": {"check_val_every_n_epoch": None, "val_check_interval": 4},
    "no validation": {"limit_val_batches": 0},
    "ends before the first validation": {"max_steps": 4},
    "ends in mid-epoch": {"max_steps": 15},
    "accumulates": {"accumulate_grad_batches": 2},
}
VALUES = (nan, 3.0, 1.0, 1.0, 4.0, nan, 4.0, inf, 0.5, -inf, 2.0)  # ties of the best and the worst
TRIGGERS: tuple[dict[str, Any], ...] = (
    {},
    {"every_n_epochs": 2},
    {"every_n_train_steps": 2},
    {"every_n_train_steps": 5},
)


@dataclass
class Kept:
    """What is in the folder of a callback, and what the callback says of it; files by step."""

    steps: set[int]
    best: int | None
    kth: int | None
    ranked: dict[int, float]
    best_score: float | None
    current_score: float | None
    kth_value: float


def step_of(path: str) -> int | None:
    return int(Path(path).stem.split("step=")[1].split("-v")[0]) if path else None


def number(score: Any) -> Any:
    return None if score is None else float(score)


def kept(callback: ModelCheckpoint) -> Kept:
    said = callback.state_dict()
    return Kept(
        steps={step_of(str(path)) for path in Path(callback.dirpath).glob("*step=*.ckpt")},
        best=step_of(said["best_model_path"]),
        kth=step_of(said["kth_best_model_path"]),
        ranked={step_of(path): float(score) for path, score in said["best_k_models"].items()},
        best_score=number(said["best_model_score"]),
        current_score=number(said["current_score"]),
        kth_value=float(said["kth_value"]),
    )


SELDOM = {"every second epoch", "ends in mid-epoch"}


@pytest.mark.parametrize("run", with_slow(list(RUNS), RUNS.keys() - SELDOM))
def test_keeps_and_says_what_model_checkpoint_does(tmp_path: Path, run: str) -> None:
    pairs = []
    for trigger in TRIGGERS:
        monitors = ["loss", "val"] if "every_n_train_steps" not in trigger else ["loss"]
        for monitor, mode, k in (
            (None, "min", 1),
            (None, "min", -1),
            *((monitor, *kind) for monitor in monitors for kind in (("min", 2), ("max", -1))),
        ):
            options = {"monitor": monitor, "mode": mode, "save_top_k": k, **trigger}
            folder = str(tmp_path / str(len(pairs)))
            pairs.append((options, Theirs(folder + "t", **options), Ours(folder + "o", **options)))
    module = Logs(VALUES)
    fit(*(each for _, *pair in pairs for each in pair), folder=tmp_path, module=module, **RUNS[run])
    for options, theirs, ours in pairs:
        if run == "across epochs" and "every_n_train_steps" in options and options["monitor"]:
            continue  # ModelCheckpoint skips the end of each epoch, as if a validation followed
        assert kept(ours) == kept(theirs), options


@pytest.mark.parametrize("run", RUNS)
def test_a_validated_step_ranks_by_its_own_validation(tmp_path: Path, run: str) -> None:
    """Of a step without one by the last before it; steps before the first wait for it."""
    module, every = Logs(VALUES), 2
    callbacks = [
        Ours(tmp_path / str(k), monitor="val", save_top_k=k, every_n_train_steps=every)
        for k in (-1, 2)
    ]
    trainer = fit(*callbacks, folder=tmp_path, module=module, **RUNS[run])
    first = min(module.logged, default=inf)
    scores = {
        step: module.logged[max(at for at in module.logged if at <= step)]
        for step in range(1, trainer.global_step + 1)
        if (step % every == 0 and step >= first) or step == first
    }
    scores = {step: inf if math.isnan(score) else score for step, score in scores.items()}
    assert kept(callbacks[0]).ranked == scores
    best = [score for _, score in sorted(kept(callbacks[1]).ranked.items())]
    assert sorted(best) == sorted(scores.values())[:2]


class Offline:
    """As much of a Trainer as ModelCheckpoint asks when it ranks."""

    current_epoch, is_global_zero, loggers, ckpt_path = 0, True, (), None

    def __init__(self, step: int) -> None:
        self.global_step, self.strategy = step, self

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision

    def save_checkpoint(self, *_: Any) -> None:
        pass

    def remove_checkpoint(self, path: str) -> None:
        pass


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, nan, inf, -inf]), max_size=12),
    st.sampled_from(["min", "max"]),
    st.integers(-1, 4),
    st.integers(0, 3),
)
def test_any_scores_rank_as_model_checkpoint_ranks_them(
    scores: list[float], mode: str, k: int, lag: int
) -> None:
    """Commits come up to ``lag`` saves late, which changes nothing."""
    theirs = ModelCheckpoint("folder", "{step}", "score", mode=mode, save_top_k=k)
    ours, waiting = Retention(k, mode, keep_newest=False), []
    for step, score in enumerate(scores):
        metrics = {"score": torch.tensor(score), "step": torch.tensor(step), "epoch": 0}
        theirs._save_topk_checkpoint(Offline(step), metrics)
        ranked = score_of(metrics, "score", mode)
        if ours.admits(ranked):
            ours.begin(f"step={step}", ranked)
            waiting.append(f"step={step}")
        while len(waiting) > lag:
            ours.commit(waiting.pop(0))
        said = standing(ours.expected(), f"{theirs.dirpath}/{{}}.ckpt".format, monitored=True)
        del said["last_model_path"]
        assert said == {word: getattr(theirs, word) for word in said}


@pytest.mark.parametrize(("mode", "worst"), [("min", inf), ("max", -inf)])
def test_a_monitor_that_is_only_ever_nan_is_the_worst_score(
    tmp_path: Path, mode: str, worst: float
) -> None:
    theirs, ours = (
        kind(tmp_path / kind.__name__, monitor="val", mode=mode) for kind in (Theirs, Ours)
    )
    fit(theirs, ours, folder=tmp_path, module=Logs((nan,)))
    assert ours.best_model_score == ours.current_score == worst
    assert kept(ours) == kept(theirs)


def test_save_last_keeps_the_newest_of_every_trigger(tmp_path: Path) -> None:
    """ModelCheckpoint's ``last.ckpt`` is by epochs only as new as the last that was ranked."""
    theirs, ours = (
        kind(tmp_path / kind.__name__, monitor="val", save_last=True) for kind in (Theirs, Ours)
    )
    fit(theirs, ours, folder=tmp_path, module=Logs((1.0, 2.0, 3.0)))
    assert torch.load(theirs.last_model_path, weights_only=True)["global_step"] == BATCHES
    assert kept(ours).steps == {BATCHES, 3 * BATCHES}
    assert kept(ours).ranked == {BATCHES: 1.0}
