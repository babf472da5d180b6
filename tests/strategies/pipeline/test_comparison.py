"""What a step returns, logs and keeps under a pipeline: as in one process, or refused.

Each module is foreign: it knows a chain of layers, and nothing else of us.
"""

from typing import Any

import lightning.pytorch as pl
import pytest
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics.classification import MulticlassAUROC

from tests.helpers.classifier import CLASSES, RUN, AddsNoise, Classifier, rows, same_as_one_process
from tests.helpers.ranks import run_ranks


class Summed(Classifier):
    loss_reduction = "sum"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum") / 32


def test_a_loss_that_is_declared_a_sum_adds_up() -> None:
    same_as_one_process(Summed)


class MeanOverSome(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets, masked = batch
        losses = F.cross_entropy(self.net(inputs), targets, reduction="none")
        return (losses * masked).sum() / masked.sum().clamp(min=1)


class SumThatIsNotDeclared(Summed):
    loss_reduction = "mean"


class MeanOverSomeOnceReady(MeanOverSome):
    def on_train_start(self) -> None:
        self.scale = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * self.scale


class LogsARatio(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("ratio", batch[0].max() / batch[0].mean())
        return super().training_step(batch, batch_idx)


class KeepsARatio(Classifier):
    ratio = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.ratio += float(batch[0].max() / batch[0].mean())
        return super().training_step(batch, batch_idx)


class LogsAMetricOfTheBatch(Classifier):
    def made(self) -> None:
        self.accuracy = MulticlassAUROC(CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        return F.cross_entropy(logits, batch[1])


class LeavesRowsOut(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets, masked = batch
        return F.cross_entropy(self.net(inputs[~masked]), targets[~masked])


class CounterWeighsLoss(Classifier):
    def made(self) -> None:
        self.seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += len(batch[1])
        return super().training_step(batch, batch_idx) * min(1.0, self.seen / 20)


REFUSED: dict[str, tuple[type[Classifier], str]] = {
    "a mean over some rows": (
        MeanOverSome,
        r"the loss of 4 micro-batches comes to .* one piece .* Define pipeline_microbatch_weight",
    ),
    "a sum": (SumThatIsNotDeclared, r'It is a sum: give the module .* loss_reduction = "sum"'),
    "in the first step": (MeanOverSomeOnceReady, "the loss of 4 micro-batches comes to"),
    "a ratio is logged": (LogsARatio, r"\(name='ratio'\): it is .* no mean, sum, .* Log it at the"),
    "a ratio is kept": (KeepsARatio, r"changes 'ratio' to .* Change it in on_train_batch_end"),
    "a metric of the batch": (LogsAMetricOfTheBatch, r"\(name='accuracy'\): .* on_step=False"),
    "a counter weighs": (CounterWeighsLoss, r"changes \['seen'\], .* them in on_train_batch_start"),
    "shapes": (LeavesRowsOut, r"of \[.*\] for micro-batch \d, and of .* first .* Leave rows out,"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_micro_batches_do_not_come_to_is_refused_before_it_trains(name: str) -> None:
    make, message = REFUSED[name]

    def refused(rank: int) -> tuple[int, bool]:
        with RUN.setting(rank) as (trainer, _):
            trainer.callbacks.append(started := Started())
            with pytest.raises(Exception, match=message):
                trainer.fit(make(), rows())
            return trainer.global_step, started.has

    at_set_up = name != "in the first step"
    assert run_ranks(refused) == [(0, not at_set_up)] * 2


class Started(pl.Callback):
    has = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.has = True


class Weighted(MeanOverSome):
    def pipeline_microbatch_weight(self, batch: Any) -> Tensor:
        return batch[2].sum()


def test_with_its_weight_the_mean_over_some_rows_trains() -> None:
    same_as_one_process(Weighted)


def test_a_random_loss_trains_with_a_warning() -> None:
    def train(rank: int) -> list[float]:
        with RUN.setting(rank) as (trainer, seen):
            if rank:
                trainer.fit(AddsNoise(), rows())
            else:
                with pytest.warns(UserWarning, match="in AddsNoise loss is another with other ran"):
                    trainer.fit(AddsNoise(), rows())
        return seen.losses

    first, second = run_ranks(train)
    assert first == second
    assert len(first) == 4


class Normed(Classifier):
    def made(self) -> None:
        self.net.insert(1, nn.BatchNorm1d(16))


def test_batch_norm_trains_with_a_warning() -> None:
    def train(rank: int) -> int:
        with RUN.setting(rank) as (trainer, seen):
            if rank:
                trainer.fit(Normed(), rows())
            else:
                with pytest.warns(UserWarning, match="statistics of one micro-batch: net.1"):
                    trainer.fit(Normed(), rows())
        return len(seen.losses)

    assert run_ranks(train) == [4, 4]
