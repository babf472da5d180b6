"""Metrics of a validation are of that validation, also behind a resume in mid-epoch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics import MeanMetric, Metric, MetricCollection, MinMaxMetric

from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.resumable import (
    Fit,
    WithValidation,
    after_validation,
    async_checkpoint,
    model_checkpoint,
    resumes,
)


class Spread(Metric):
    """Has the state of another one, so that a collection groups them."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, value: torch.Tensor) -> None:
        self.total = self.total + value.detach()
        self.count += 1

    def compute(self) -> torch.Tensor:
        return (self.total / self.count) ** self.power


class Measures(WithValidation):
    """Monitors a metric object in its plateau scheduler, and keeps some of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.val_mean, self.of_both = MeanMetric(), MeanMetric()
        self.together = MetricCollection({"one": Spread(1), "two": Spread(2)})
        self.of_training = MetricCollection({"three": Spread(1), "four": Spread(2)})
        self.of_run, self.extremes = MeanMetric(), MinMaxMetric(MeanMetric())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.of_both.update(loss.detach())
        self.of_training.update(loss.detach())
        self.log("both", self.of_both, on_step=False, on_epoch=True)
        self.log_dict(self.of_training, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        for metric in (self.val_mean, self.of_both, self.of_run, self.extremes):
            metric.update(loss)
        self.together.update(loss)
        self.log("val_mean", self.val_mean)
        self.log("val_both", self.of_both)
        self.log_dict(self.together)

    def on_validation_epoch_end(self) -> None:
        self.log("of_run", float(self.of_run.compute()))
        self.log("greatest", self.extremes.compute()["max"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        reduce = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        config = {"scheduler": reduce, "monitor": "val_mean", "interval": "step", "frequency": 4}
        return {"optimizer": optimizer, "lr_scheduler": {**config, "strict": False}}


@pytest.mark.parametrize(
    ("savers", "positions"),
    [(after_validation, (4, 10)), (async_checkpoint, (4, 5, 10)), (model_checkpoint, (5, 9, 11))],
)
def test_the_next_validation_has_metrics_of_its_own(
    tmp_path: Path, savers: Any, positions: tuple[int, ...]
) -> None:
    resumes(Fit(tmp_path, Measures, savers, trainer={"val_check_interval": 2}), *positions)


def test_metrics_of_a_validation_on_two_ranks(tmp_path: Path) -> None:
    def on(rank: int) -> None:
        ranks = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        trainer = {**ranks, "val_check_interval": 1}
        resumes(Fit(tmp_path, Measures, after_validation, trainer=trainer), 1, 4)

    run_ranks(on)
