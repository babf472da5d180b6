"""SpikeGuard on two ranks: one verdict, and all skip; under DDP, in a pipeline, with blocks on
disk."""

import math
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align import PretrainModule, SpikeGuard
from tests.callbacks.test_spike_guard import Watch
from tests.helpers.pipelines import Run, one_process, pipeline
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.spiky import AlarmAt, Regression, batches
from tests.modules.test_pretrain import llama, rows

POISONED = 4  # the batch that is not a number on one rank


class PoisonedRegression(Regression):
    """On one rank a batch has a loss that is not a number."""

    rank = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        poisoned = self.global_rank == self.rank and batch_idx == POISONED
        return loss * math.nan if poisoned else loss


class PoisonedPretrain(PretrainModule):
    """The same of ours."""

    rank = 0
    number = 0

    def loss_from_hidden(self, hidden_BTD: torch.Tensor, batch: Any) -> Any:
        loss, sums = super().loss_from_hidden(hidden_BTD, batch)
        poisoned = self.global_rank == self.rank and self.number == POISONED
        self.number += 1
        if poisoned:
            return loss * math.nan, {**sums, "loss": (sums["loss"][0] * math.nan, sums["loss"][1])}
        return loss, sums


def train_on_ranks(make: Any, data: Any, strategy: Any = "ddp", **options: Any) -> list[Any]:
    """(weights behind each step, what the detector has seen) of each of two ranks."""

    def train(rank: int) -> Any:
        guard = SpikeGuard(detector=NanDetector())
        watch = Watch()
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy() if callable(strategy) else strategy,
            plugins=[ForkedRanks(rank, 2)],
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[guard, watch],
            use_distributed_sampler=False,
            **options,
        )
        module = make()
        trainer.fit(module, DataLoader(data(rank), batch_size=None))
        return watch.weights, guard.detector.seen  # type: ignore[attr-defined]

    return run_ranks(train)


class NanDetector(AlarmAt):
    """Raises an alarm at what is not a number, and notes what it is told."""

    def update(self, step: int, loss: float, grad_norm: float | None = None) -> Any:
        self.steps = () if math.isfinite(loss) else (step,)
        return super().update(step, loss, grad_norm)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "kind", [PoisonedRegression, pytest.param(PoisonedPretrain, marks=pytest.mark.slow)]
)
def test_nan_on_one_rank_is_skipped_on_both(kind: Any, rank: int) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        module = kind() if kind is PoisonedRegression else kind(llama())
        module.rank = rank
        return module

    def data(rank: int) -> Any:
        if kind is PoisonedRegression:
            return batches(20)[rank::2]
        return [rows(i, i + 1) for i in range(rank, 20, 2)]

    (ours, seen), (theirs, also_seen) = train_on_ranks(make, data)
    assert all(map(torch.equal, ours, theirs))
    assert str(seen) == str(also_seen)  # NaN included
    assert [step for step, loss, _ in seen if not math.isfinite(loss)] == [POISONED]
    assert torch.equal(ours[POISONED], ours[POISONED - 1])
    assert not torch.equal(ours[POISONED + 1], ours[POISONED])
    assert ours[-1].isfinite().all()


PIPELINES: list[dict[str, Any]] = [
    {"schedule": "1F1B"},
    {"schedule": "Interleaved1F1B", "num_stages_per_rank": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", PIPELINES, ids=lambda each: each["schedule"])
@pytest.mark.parametrize("model", ["chain", "llama"])
def test_a_pipeline_skips_on_all_ranks_as_one_process_does(
    model: str, strategy: dict[str, Any]
) -> None:
    guard = lambda: SpikeGuard(detector=AlarmAt(2, 5))  # noqa: E731
    run = Run(model, strategy, steps=9, callbacks=[guard], clip=0.1)
    run = replace(run, data={"masked": model != "chain"})
    ranks, alone = pipeline(run), one_process(run)
    unguarded = one_process(replace(run, callbacks=()))
    assert ranks[0]["losses"] == ranks[1]["losses"]
    # Sums over micro-batches in another order, in fp32.
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert alone["losses"][:3] == unguarded["losses"][:3]
    assert alone["losses"][3:] != pytest.approx(unguarded["losses"][3:], rel=1e-4)
