"""Decisions of a run: the same on every rank, with any workers, and wherever it is resumed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align.callbacks.curriculum.feedback import Feedback, self_paced
from lightning_align.data.curriculum_sampler import CurriculumSampler
from lightning_align.data.feedback import SelfPaced
from lightning_align.data.pacing import CurriculumScheduler
from lightning_align.run.callbacks import put_first
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.resumable import Fit, Plain, every_batch, later, model_checkpoint, resumes
from tests.helpers.rewinds import Rewinds

ROWS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
CONFIG = {"min_difficulty": 8, "max_difficulty": 24, "schedule_type": "self_paced"}
RULE = {"difficulty_step": 8, "window": 2, "threshold": 0.2}


class Paces(pl.Callback):
    """Hands losses to the scheduler of a sampler, as Curriculum does."""

    def __init__(self, lag: int) -> None:
        self.scheduler = SelfPaced({**CONFIG, "schedule_config": {**RULE, "lag": lag}})
        self.feedback = Feedback({"order": self.scheduler})

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        put_first(trainer, self)
        pl_module.scheduler = self.scheduler

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.feedback.begin(trainer, pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self.feedback.add(trainer, loss)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.feedback.end_batch(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return self.feedback.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.feedback.load_state_dict(state)


class Loads(Plain):
    """Writes down of which rows its batches are; its loss does not depend on them alone."""

    scheduler: SelfPaced

    def __init__(self, folder: Path, workers: int = 0) -> None:
        super().__init__()
        self.folder, self.workers = folder, workers

    def train_dataloader(self) -> Any:
        ranks = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        sampler = CurriculumSampler(
            range(1, 25), self.scheduler, 4 // ranks["num_replicas"], **ranks
        )
        options: dict[str, Any] = {"num_workers": self.workers}
        if self.workers:
            options["multiprocessing_context"] = "fork"
        return DataLoader(ROWS, sampler=sampler, batch_size=None, **options)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with (self.folder / f"rows.{self.trainer.global_rank}").open("a") as file:
            file.write(json.dumps(batch[:, 0].tolist()) + "\n")
        return self.loss(batch)


def a_fit(folder: Path, *, lag: int = 5, workers: int = 0, **trainer: Any) -> Fit:
    module = lambda: Loads(folder, workers)  # noqa: E731
    return Fit(folder, module, model_checkpoint, lambda: [Paces(lag)], trainer=trainer)


def decisions(fit: Fit, position: int) -> list[list[int]]:
    """Those in a checkpoint."""
    states = torch.load(fit.checkpoint(position), weights_only=True)["callbacks"]
    return states["Paces"]["schedulers"]["order"]["decisions"]


@pytest.mark.slow
def test_a_run_is_resumed_before_and_behind_a_decision(tmp_path: Path) -> None:
    """It is taken with batch 3's loss: from batch 9 on. Each batch around both is tried."""
    fit = a_fit(tmp_path)
    whole = fit.run()
    assert decisions(fit, 3) == [[0, 0]]
    (first, *_) = decisions(fit, 18)[1:]
    taken = first[0] - 5
    for position in (taken - 1, taken, first[0] - 1, first[0]):
        resumed = fit.run(f"from-{position}", ckpt_path=fit.checkpoint(position))
        assert later(resumed, position) == later(whole, position), position


@pytest.mark.slow
def test_workers_and_lags_that_suffice_change_no_batch(tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        a_fit(folder, workers=workers).run()
        found.append((folder / "rows.0").read_text())
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_is_killed_one_batch_before_and_behind_a_decision_takes_effect(
    tmp_path: Path, workers: int
) -> None:
    fit = a_fit(tmp_path, workers=workers)
    whole = fit.run()
    first = decisions(fit, 18)[1][0]
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    for position in (first - 1, first + 1):
        fit.killed_at(position)
        resumed = fit.run(f"from-{position}", ckpt_path=fit.checkpoint(position))
        assert later(resumed, position) == later(whole, position), position
        for path in tmp_path.glob("*.ckpt"):
            path.unlink()


@pytest.mark.slow
def test_going_back_behind_a_decision_takes_it_again(tmp_path: Path) -> None:
    fit = a_fit(tmp_path)
    whole = fit.run()
    effect = decisions(fit, 18)[1][0]
    back = Rewinds(effect - 7, effect + 2, times=1)
    again = fit.run("again", extra=[back])
    assert back.times == 0
    assert again[-1] == whole[-1]
    assert [*dict.fromkeys(again[:-1])] == whole[:-1]  # what was repeated is the same


@pytest.mark.slow
def test_in_mid_accumulation(tmp_path: Path) -> None:
    fit = a_fit(tmp_path, accumulate_grad_batches=3)
    resumes(replace(fit, savers=every_batch), 4, 7, 8)


@pytest.mark.slow
def test_ranks_decide_alike_and_are_resumed(tmp_path: Path) -> None:
    def on(rank: int) -> None:
        fit = a_fit(tmp_path, devices=2, strategy="ddp", plugins=[ForkedRanks(rank, 2)])
        resumes(fit, 3, 10)
        assert len(decisions(fit, 18)) > 1

    run_ranks(on)


@pytest.mark.parametrize(("lag", "workers", "ahead"), [(4, 2, 5), (1, 1, 3)])
def test_a_lag_shorter_than_what_loaders_draw_ahead_is_refused(
    tmp_path: Path, lag: int, workers: int, ahead: int
) -> None:
    fit = a_fit(tmp_path, lag=lag, workers=workers)
    with pytest.raises(ValueError, match=rf"SelfPaced\(lag={lag}\): {workers} workers .* {ahead} "):
        fit.run()


def test_only_schedulers_that_losses_pace_are_told() -> None:
    paced = SelfPaced({**CONFIG, "schedule_config": {"difficulty_step": 8}})
    linear = {"total_curriculum_step": 9, "difficulty_step": 1}
    other = {**CONFIG, "schedule_type": "fixed_linear", "schedule_config": linear}
    assert self_paced({"length": CurriculumScheduler(other), "order": paced}) == {"order": paced}
