"""When micro-batches are compared with their batch, and what is said of it."""

import random
import warnings
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.helpers.classifier import RUN, AddsNoise, Classifier, rows
from tests.helpers.ranks import run_ranks


class LogsNoise(AddsNoise):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("noisy", loss)
        return loss


class LogsACountLate(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("late", float(len(batch[1])) if batch_idx > 1 else 0.0)
        return super().training_step(batch, batch_idx)


def test_what_cannot_be_told_is_warned_of_once_for_what_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_align.strategies.pipeline.step_comparisons._COMPARISONS", 1)

    def warned(rank: int, make: type[Classifier]) -> list[str]:
        with RUN.setting(rank) as (trainer, _), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(make(), rows())
        return [str(w.message) for w in caught if "PipelineStrategy: " in str(w.message)]

    noise, _ = run_ranks(lambda rank: warned(rank, LogsNoise))
    assert len(noise) == 1
    assert "loss, log noisy is another with other random numbers" in noise[0]
    late, _ = run_ranks(lambda rank: warned(rank, LogsACountLate))
    assert len(late) == 1
    assert "['log late'], of which 1 comparison" in late[0]


class TurnsToTheBatch(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        return loss + logits.std(0).mean() if batch_idx > 1 else loss


def test_a_loss_that_turns_to_what_micro_batches_do_not_come_to_is_warned_of() -> None:
    def warned(rank: int) -> list[str]:
        with RUN.setting(rank) as (trainer, _), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(TurnsToTheBatch(), rows())
        return [str(w.message) for w in caught if "PipelineStrategy(" in str(w.message)]

    (told,), _ = run_ranks(warned)
    assert "the loss of 4 micro-batches comes to" in told
    assert told.endswith("It did come to the same in the first batch.")


class DrawsForItself(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.generators = nn.Module()  # as a part of the model has its own
        self.generators.dice = random.Random(1)
        self.generators.numbers = np.random.default_rng(1)
        self.noise = torch.Generator().manual_seed(1)

    def draw(self) -> list[float]:
        numbers = [self.generators.dice.random(), float(self.generators.numbers.random())]
        return [*numbers, float(torch.rand(1, generator=self.noise))]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.draw()
        return super().training_step(batch, batch_idx)


def test_comparing_leaves_no_trace() -> None:
    """The bits are those of a run that compares nothing."""
    from lightning_align.strategies.pipeline.step_comparisons import StepComparisons

    def train(rank: int, compares: bool) -> Any:
        if not compares:
            StepComparisons.compare = lambda *_, **__: None  # type: ignore[assignment]
        with RUN.setting(rank) as (trainer, seen):
            pl.seed_everything(4, verbose=False)
            module = DrawsForItself()
            module.net.insert(1, nn.BatchNorm1d(16))
            module.net.append(nn.Dropout(0.5))
            trainer.fit(module, rows())
            drawn = [*torch.rand(3).tolist(), *module.draw()]
            return seen.losses, [b.tolist() for b in module.buffers()], drawn

    theirs = run_ranks(lambda rank: train(rank, compares=False))
    assert run_ranks(lambda rank: train(rank, compares=True)) == theirs
