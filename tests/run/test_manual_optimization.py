"""Gradients of a manual optimization wait as long as the module likes, across epochs too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.resumable import (
    Fit,
    Plain,
    WithValidation,
    async_checkpoint,
    every_batch,
    model_checkpoint,
    resumes,
)


class EveryFour(Plain):
    """Steps once in four batches, of epochs with six."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.waiting = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.manual_backward(loss / 4)
        self.waiting += 1
        if self.waiting == 4:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
            self.waiting = 0
        return {"loss": loss.detach()}


@pytest.mark.parametrize("savers", [every_batch, async_checkpoint, model_checkpoint])
def test_gradients_that_wait_at_an_epochs_end_and_in_it_are_saved(
    tmp_path: Path, savers: Any
) -> None:
    # Others than every_batch save by optimizer steps: the last of them in an epoch, and its end.
    resumes(Fit(tmp_path, EveryFour, savers), *([5, 6, 8] if savers is every_batch else [8, 12]))


def test_gradients_that_wait_on_two_ranks_are_saved(tmp_path: Path) -> None:
    def on(rank: int) -> None:
        trainer = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        resumes(Fit(tmp_path, EveryFour, every_batch, trainer=trainer), 3, 5)

    run_ranks(on)


class TwoOptimizers(WithValidation):
    """A generator and a discriminator that take turns, with schedulers stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(1, 1)
        self.turns = {"body": 0, "critic": 0}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = self.optimizers()
        ours = second if self.turns["body"] > self.turns["critic"] else first
        self.toggle_optimizer(ours)
        loss = self.loss(batch) + self.critic(self.body(batch)).square().mean()
        self.manual_backward(loss)
        if batch_idx % 2:
            self.clip_gradients(ours, 0.5, "norm")
            ours.step()
            ours.zero_grad()
            self.lr_schedulers()[0].step()
        self.untoggle_optimizer(ours)
        self.turns["critic" if ours is second else "body"] += 1
        return {"loss": loss.detach()}

    def configure_optimizers(self) -> Any:
        first = torch.optim.Adam(self.body.parameters(), lr=1e-2)
        second = torch.optim.SGD(self.critic.parameters(), lr=1e-2)
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in (first, second)]
        return [first, second], schedulers


@pytest.mark.parametrize("savers", [every_batch, async_checkpoint])
def test_two_optimizers_that_take_turns_go_on(tmp_path: Path, savers: Any) -> None:
    resumes(Fit(tmp_path, TwoOptimizers, savers), 8, 10)


class StaysToggled(TwoOptimizers):
    """Undoes its toggling at the next batch only."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = self.optimizers()
        before, ours = (first, second) if self.turns["body"] else (second, first)
        self.untoggle_optimizer(before)
        self.toggle_optimizer(ours)
        loss = self.loss(batch) + self.critic(self.body(batch)).square().mean()
        self.manual_backward(loss)
        ours.step()
        ours.zero_grad()
        self.turns["body"] = 1 - self.turns["body"]
        return {"loss": loss.detach()}


def test_a_toggled_optimizer_goes_on_toggled(tmp_path: Path) -> None:
    resumes(Fit(tmp_path, StaysToggled, every_batch), 7, 8)
